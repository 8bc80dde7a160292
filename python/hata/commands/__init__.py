"""The subcommands of `hata`, one a file."""

import importlib.util

from hata.checks import check


def need(command: str, *packages: str) -> None:
    """Checks that these packages of the extra `transformers` are installed.

    Raises:
        ValueError: One is not.
    """
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    rule = "be installed (pip install 'hata-attention[transformers]')"
    check(not missing, command, " and ".join(packages), rule, f"no {' and no '.join(missing)}")
