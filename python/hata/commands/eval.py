"""``hata eval``."""

from hata.commands import need
from hata.commands.options import with_options
from hata.eval.options import EvalOptions


@with_options()
def evaluate(options: EvalOptions) -> None:
    """Measures what sparse decoding costs a model in likelihood and in answers."""
    need("eval", "transformers", *(["matplotlib"] if options.report is not None else []))
    from hata.eval.run import run_eval

    run_eval(options)
