"""Fields of a command's dataclass parameters are its options."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import pytest
import typer
from typer import Argument, Option
from typer.testing import CliRunner

from hata.commands.options import with_options


@dataclass(frozen=True, kw_only=True)
class Walk:
    """Where to walk.

    Raises:
        ValueError: There are no steps.
    """

    folder: Annotated[Path, Argument(help="Where from.")]
    steps: Annotated[int, Option(help="How far.")] = 3
    stops: Annotated[list[str], Option(help="Where to stop.")] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError("no steps")


@dataclass(frozen=True)
class Pace:
    speed: Annotated[float, Option(help="Kilometres an hour.")] = 5.0
    barefoot: Annotated[bool, Option(help="Without shoes.")] = False


SLOW = Pace(4.0)


def run(*args: str) -> str:
    app = typer.Typer(add_completion=False, rich_markup_mode=None)

    @app.command()
    @with_options(without=("barefoot",))
    def walk(
        walked: Walk, *, name: Annotated[str, Option(help="Whose.")] = "me", pace: Pace = SLOW
    ) -> None:
        """Walks."""
        print(walked, name, pace)

    result = CliRunner().invoke(app, args)
    if isinstance(result.exception, ValueError):
        raise result.exception
    return result.output


def test_fields_are_options_with_their_own_defaults_or_those_of_an_instance():
    assert run("here") == f"{Walk(folder=Path('here'))} me {Pace(4.0)}\n"
    given = run("here", "--steps", "9", "--stops", "a", "--stops", "b", "--speed", "6")
    walked = Walk(folder=Path("here"), steps=9, stops=["a", "b"])
    assert given == f"{walked} me {Pace(6.0)}\n"


def test_help_is_that_of_the_fields_and_of_the_command():
    said = run("--help")
    for text in ("Walks.", "Where from.", "How far.", "[default: 3]", "Whose.", "[default: 4.0]"):
        assert text in said


def test_a_field_that_is_left_out_is_no_option():
    assert "barefoot" not in run("--help")
    assert "No such option: --barefoot" in run("here", "--barefoot")


def test_a_field_without_default_is_required_and_the_class_checks_its_rules():
    assert "Missing argument" in run()
    with pytest.raises(ValueError, match="no steps"):
        run("here", "--steps", "0")
