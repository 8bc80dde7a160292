"""``hata demo``."""

from hata.commands import need
from hata.commands.options import with_options
from hata.demo.options import DemoOptions


@with_options()
def demo(options: DemoOptions) -> None:
    """Generates an answer from a long prompt twice: with dense attention and with hata."""
    need("demo", "transformers", "matplotlib")
    from hata.demo.run import run_demo

    run_demo(options)
