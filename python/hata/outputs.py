"""The places that commands write to, and files that are whole or not there."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from hata.checks import check

CONTINUE = "; run the same command again to continue"  # where a command takes up what it has left


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


@contextmanager
def whole_file(file: Path, function: str, advice: str = "") -> Iterator[Path]:
    """Gives a path to write to, and moves what was written there to ``file`` once it is complete.

    The file's mode is what the umask leaves, whatever the writer chose. A device or a pipe is
    written in place.

    Args:
        file: Where it will stand, in an existing folder.
        function: The public function that writes, for errors.
        advice: What an error says at its end.

    Raises:
        ValueError: It cannot be written; what stood there stays.
    """
    if file.exists() and not file.is_file():
        yield file
        return
    file = file.resolve()  # a link's target is replaced, not the link
    partial = file.with_name(f".partial-{file.name}")  # keeps the suffix, which says the format
    try:
        partial.touch()
        mode = partial.stat().st_mode
        yield partial
        partial.chmod(mode)  # safetensors makes its files 0600
        partial.replace(file)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch raises RuntimeError
        raise ValueError(
            f"hata.{function}: {file.parent} must have room for {file.name}, got {error}{advice}"
        ) from error
    finally:
        partial.unlink(missing_ok=True)


def _writable(folder: Path) -> bool:
    """Whether the folder can be made and a file in it; a mode does not tell, root passes each."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False
