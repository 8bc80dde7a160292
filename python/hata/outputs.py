"""The places that commands write to."""

import os
from pathlib import Path

from hata.checks import check


def make_output_folder(folder: Path, function: str, argument: str) -> None:
    """Makes a folder to write into, and those above it, unless it is there.

    Raises:
        ValueError: It cannot be made or written.
    """
    check(_writable(folder), function, argument, "be a folder that can be written", folder)


def make_room_for(file: Path, function: str, argument: str) -> None:
    """Makes the folder of a file to write, and those above it, unless it is there.

    Raises:
        ValueError: It cannot be made or written, or the file is a folder.
    """
    check(not file.is_dir(), function, argument, "be a file", f"the folder {file}")
    writable = _writable(file.parent)
    check(writable, function, argument, "lie in a folder that can be written", file)


def _writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK)
