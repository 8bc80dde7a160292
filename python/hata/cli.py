"""The command `hata`: the demo and the benchmarks.

Whatever a user can get wrong is answered with one line, "error: <argument> must <rule>, got
<value>", and exit status 2.
"""

import importlib
import re
import sys
from pathlib import Path
from typing import Annotated

import typer

from hata.checks import check
from hata.commands.capture import capture, corpus
from hata.commands.extras import need
from hata.commands.recall import recall
from hata.commands.train import train
from hata.version import VERSION

app = typer.Typer(
    help="Hash-aware top-k attention for long-context decoding.",
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"hata {VERSION}")
        raise typer.Exit


@app.callback()
def hata(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version.", callback=_show_version, is_eager=True),
    ] = False,
) -> None:
    """Hash-aware top-k attention for long-context decoding."""


@app.command()
def demo(
    model: Annotated[
        Path | None,
        typer.Option(help="Local transformers folder; by default SmolLM2-135M-Instruct."),
    ] = None,
    context: Annotated[int, typer.Option(help="Tokens of prompt and answer together.")] = 2048,
    depth: Annotated[
        float, typer.Option(help="Where in the prose the fact stands, 0 (first) to 1 (last).")
    ] = 0.5,
    top_k: Annotated[int, typer.Option(help="Positions each KV head attends to.")] = 128,
    weights: Annotated[
        str | None,
        typer.Option(help="File of hash weights, or random; by default the package's own."),
    ] = None,
    num_bits: Annotated[
        int | None, typer.Option(help="Bits of a key's code; by default what the weights have.")
    ] = None,
    query_bits: Annotated[
        int | None, typer.Option(help="Bits of a query's projection, 1 to 4; 4 by default.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of random hash weights and of the fact.")] = 0,
    max_new_tokens: Annotated[int, typer.Option(help="The longest answer, in tokens.")] = 32,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda or cuda:N; by default a GPU where there is one.")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="float32, bfloat16 or float16; by default float32, on a GPU bfloat16."),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Write the attention mass per layer to this PNG file.")
    ] = None,
) -> None:
    """Generates an answer from a long prompt twice: with dense attention and with hata."""
    need("demo", "transformers", "matplotlib")
    from hata.demo.options import DemoOptions
    from hata.demo.run import run_demo

    run_demo(
        DemoOptions(
            model=model,
            context=context,
            depth=depth,
            top_k=top_k,
            weights=weights,
            num_bits=num_bits,
            query_bits=query_bits,
            seed=seed,
            max_new_tokens=max_new_tokens,
            device=device,
            dtype=dtype,
            plot=plot,
        )
    )


@app.command(
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def bench(context: typer.Context) -> None:
    """Measures the operators and the decoding step; needs a checkout (see its own --help)."""
    checkout = Path(__file__).resolve().parents[2]
    rule = "run in hata's checkout, installed with pip install -e"
    check((checkout / "bench" / "main.py").is_file(), "bench", "hata bench", rule, checkout)
    sys.path.insert(0, str(checkout))
    bench_app = importlib.import_module("bench.main").app
    status = bench_app(args=context.args, prog_name="hata bench", standalone_mode=False)
    raise typer.Exit(status if isinstance(status, int) else 0)


app.command()(corpus)
app.command()(capture)
app.command()(train)
app.command()(recall)


def _user_error(error: Exception) -> str | None:
    """Returns the one line to print when the user is at fault, None when hata is."""
    if format_message := getattr(error, "format_message", None):  # typer's usage errors
        return " ".join(str(format_message()).split())
    named = re.match(r"hata(?:\.|::)[\w.]+: (.*)", str(error))
    return named[1] if named else None


def main(args: list[str] | None = None) -> None:
    """Runs the command and exits with its status.

    Args:
        args: The command line without the program's name; None takes the process's.
    """
    try:
        status = app(args=args, prog_name="hata", standalone_mode=False)
    except typer.Abort:
        sys.exit(130)
    except Exception as error:
        message = _user_error(error)
        if message is None:
            raise
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)
    sys.exit(status if isinstance(status, int) else 0)
