"""The command `hata`.

Whatever a user can get wrong is answered with one line, "error: <argument> must <rule>, got
<value>", and exit status 2.
"""

import re
import sys
from typing import Annotated

import typer

from hata.commands.capture import capture, corpus
from hata.commands.demo import demo
from hata.commands.eval import evaluate
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


app.command()(demo)
app.command()(corpus)
app.command()(capture)
app.command()(train)
app.command()(recall)
app.command("eval")(evaluate)


def _user_error(error: Exception) -> str | None:
    """Returns the one line to print when the user is at fault, None when hata is."""
    if format_message := getattr(error, "format_message", None):  # typer's usage errors
        return " ".join(str(format_message()).split())
    named = re.match(r"hata(?:\.|::)[\w.]+: (.*)", str(error))
    return named[1] if named else None


def run_app(app: typer.Typer, prog_name: str, args: list[str] | None = None) -> None:
    """Runs a command line and exits with its status.

    Args:
        app: The commands.
        prog_name: The program's name.
        args: The command line without the program's name; None takes the process's.
    """
    try:
        status = app(args=args, prog_name=prog_name, standalone_mode=False)
    except typer.Abort:
        sys.exit(130)
    except Exception as error:
        message = _user_error(error)
        if message is None:
            raise
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)
    sys.exit(status if isinstance(status, int) else 0)


def main(args: list[str] | None = None) -> None:
    """Runs the command `hata` and exits with its status; see `run_app`."""
    run_app(app, "hata", args)
