"""``hata recall``."""

from hata.commands import need
from hata.commands.options import with_options
from hata.recall.options import RecallOptions


@with_options()
def recall(options: RecallOptions) -> None:
    """Measures how much of the attention hash weights and other selectors find."""
    if options.plot is not None:
        need("recall", "matplotlib")
    from hata.recall.run import run_recall

    run_recall(options)
