"""Which version of the source made a result."""

import contextlib
import os
import subprocess
from pathlib import Path


def commit() -> str:
    """Returns the checkout's commit, "-dirty" where files have changed.

    HATA_COMMIT, where it is set, names it instead: for a copy of the files whose git does not know.
    Where hata does not lie in a checkout it is "unknown".
    """
    if named := os.environ.get("HATA_COMMIT"):
        return named
    root = Path(__file__).resolve().parents[2]
    if (root / ".git").exists():
        describe = ["git", "-C", str(root), "describe", "--always", "--dirty"]
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            return subprocess.run(
                describe, check=True, capture_output=True, text=True
            ).stdout.strip()
    return "unknown"
