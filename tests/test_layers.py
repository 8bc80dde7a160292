"""Each room of python/hata knows those alone that CONTRIBUTING.md puts above it."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

CHECKOUT = Path(__file__).parents[1]
PACKAGE = CHECKOUT / "python" / "hata"
ENTRIES = {"__init__", "__main__"}  # what is public, and the command line: they name everything


def layers() -> list[list[str]]:
    """The numbered list under "Layers": the rooms of each line, before its colon."""
    section = CHECKOUT.joinpath("CONTRIBUTING.md").read_text().split("\n## Layers\n")[1]
    lines = re.findall(r"^\d+\. (.*?):", section.split("\n## ")[0], flags=re.MULTILINE)
    return [re.findall(r"`(\w+)`", line) for line in lines]


def files() -> Iterator[tuple[str, Path]]:
    """Every module, with the room that it belongs to: a file or a folder of python/hata."""
    for path in PACKAGE.rglob("*.py"):
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if room not in ENTRIES:
            yield room, path


def imported_rooms(source: str) -> Iterator[str]:
    """The rooms that a module imports anywhere in it: late and for type checkers too."""
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            inside = node.module == "hata"
            names = [f"hata.{x.name}" for x in node.names] if inside else [str(node.module)]
        for name in names:
            package, _, rest = name.partition(".")
            if package == "hata":
                yield rest.partition(".")[0] or "__init__"


def test_contributing_lists_every_room_once():
    listed = [room for layer in layers() for room in layer]
    assert sorted(listed) == sorted({room for room, _ in files()})


def test_every_room_imports_only_what_is_above_it():
    place = {room: i for i, layer in enumerate(layers()) for room in layer}
    wrong = [
        f"{path.relative_to(PACKAGE)} imports {other}"
        for room, path in files()
        for other in imported_rooms(path.read_text())
        if other not in (room, "_C") and place.get(other, len(place)) >= place[room]
    ]
    assert not wrong
