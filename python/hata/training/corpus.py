"""A corpus for training and for held-out evaluation, from Debian packages and Python itself.

The two halves differ in kind: technical documentation, source code, essays and quotations to train
on; scripture, a handbook, a dictionary and licences to evaluate on. Python's own documentation is
in neither: the prompt of `hata demo` is made of it.
"""

import gzip
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

from hata.checks import check
from hata.outputs import make_output_folder
from hata.progress import progress_bar

TRAIN, HELDOUT = "train", "heldout"
_MIN_CHARACTERS = 2000  # shorter files are tables of contents and stubs
_LEFT_OUT = ("pydoc_data", "site-packages")  # folders in the standard library's


class _Text(HTMLParser):
    """Collects the text of a page, without scripts, styles and navigation."""

    _SKIPPED = ("script", "style", "head", "nav")

    def __init__(self) -> None:
        super().__init__()
        self.pieces: list[str] = []
        self._skipped = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._skipped += tag in self._SKIPPED

    def handle_endtag(self, tag: str) -> None:
        self._skipped -= tag in self._SKIPPED

    def handle_data(self, data: str) -> None:
        if not self._skipped:
            self.pieces.append(data)


def _plain(path: Path) -> str:
    return path.read_text(errors="replace")


def _gzipped(path: Path) -> str:
    return gzip.decompress(path.read_bytes()).decode(errors="replace")


def _html(path: Path) -> str:
    page = _Text()
    page.feed(_plain(path))
    return "".join(page.pieces)


@dataclass(frozen=True)
class TextSource:
    """Documents of one origin.

    Attributes:
        name: Of its folder.
        split: `TRAIN` or `HELDOUT`.
        licence: Of its text.
        packages: Debian packages that carry it; none for Python's standard library.
        pattern: Which files in them.
        read: Turns a file into text.
    """

    name: str
    split: str
    licence: str
    packages: tuple[str, ...]
    pattern: str
    read: Callable[[Path], str] = _plain


SOURCES = (
    TextSource("python", TRAIN, "PSF-2.0", (), "**/*.py"),
    TextSource(
        "perl", TRAIN, "GPL-1.0-or-later or Artistic", ("perl-doc",), "usr/share/perl/*/pod/*.pod"
    ),
    TextSource(
        "linux",
        TRAIN,
        "GPL-2.0",
        ("linux-doc-6.1",),
        "usr/share/doc/linux-doc-*/Documentation/**/*.rst.gz",
        _gzipped,
    ),
    TextSource(
        "essays",
        TRAIN,
        "GFDL-1.1-or-later or GPL-2.0-or-later (An Anarchist FAQ)",
        ("anarchism",),
        "usr/share/doc/anarchism/html/*.html",
        _html,
    ),
    TextSource(
        "quotations",
        TRAIN,
        "BSD-style collection; short quotations of many authors",
        ("fortunes",),
        "usr/share/games/fortunes/*",
    ),
    TextSource("bible", HELDOUT, "public domain", ("bible-kjv", "bible-kjv-text"), "usr/bin/bible"),
    TextSource(
        "handbook",
        HELDOUT,
        "GPL-2.0-or-later or CC-BY-SA-3.0",
        ("debian-handbook",),
        "usr/share/doc/debian-handbook/html/en-US/*.html",
        _html,
    ),
    TextSource(
        "dictionary",
        HELDOUT,
        "GPL-3.0-or-later (GCIDE)",
        ("dict-gcide",),
        "usr/share/dictd/gcide.dict.dz",
        _gzipped,
    ),
    TextSource(
        "licences", HELDOUT, "verbatim copying", ("base-files",), "usr/share/common-licenses/*"
    ),
)


def build_corpus(folder: Path) -> dict[str, int]:
    """Fetches the corpus and writes it, one text file a document.

    The packages are downloaded with apt-get and unpacked, not installed.

    Args:
        folder: Gets ``train/`` and ``heldout/``, with a folder for each source, and
            ``SOURCES.txt``, which names packages, versions and licences; 120 MB in all. Must be
            empty or not exist.

    Returns:
        Characters by split.

    Raises:
        ValueError: The folder is not empty, or this machine or its package archive lacks
            something.
    """
    where = "corpus"
    empty = not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
    check(empty, where, "folder", "be empty or not exist", folder)
    make_output_folder(folder, where, "folder")
    for program in ("apt-get", "dpkg-deb"):
        got = f"no {program}"
        check(shutil.which(program) is not None, where, "the machine", "be Debian's kind", got)
    sizes = {TRAIN: 0, HELDOUT: 0}
    notes = []
    bar = progress_bar("fetching texts", len(SOURCES))
    with tempfile.TemporaryDirectory() as scratch, bar as advance:
        for source in SOURCES:
            root, origin = _fetch(source, Path(scratch) / source.name)
            home = folder / source.split / source.name
            home.mkdir(parents=True)
            count = 0
            for name, text in _documents(source, root):
                (home / f"{name}.txt").write_text(text)
                sizes[source.split] += len(text)
                count += 1
            check(count > 0, where, source.name, "have documents", origin)
            said = f"{source.name}, {count} files, {source.licence}: {origin}"
            notes.append(f"{source.split}: {said}")
            advance()
    (folder / "SOURCES.txt").write_text("\n".join(notes) + "\n")
    return sizes


def _fetch(source: TextSource, scratch: Path) -> tuple[Path, str]:
    """Returns the folder with a source's files, and where they come from."""
    if not source.packages:
        return Path(sysconfig.get_path("stdlib")), "Python's standard library"
    scratch.mkdir()
    command = ["apt-get", "download", "-qq", *source.packages]
    done = subprocess.run(command, cwd=scratch, capture_output=True, text=True, check=False)
    rule = "be downloadable with apt-get"
    names = ", ".join(source.packages)
    check(done.returncode == 0, "corpus", names, rule, " ".join(done.stderr.split()))
    archives = sorted(scratch.glob("*.deb"))
    for archive in archives:
        subprocess.run(["dpkg-deb", "-x", archive, scratch], check=True)
    return scratch, ", ".join(archive.stem for archive in archives)


def _documents(source: TextSource, root: Path) -> Iterator[tuple[str, str]]:
    """Yields name and text of each document that is long enough."""
    if source.name == "bible":
        yield "kjv", _scripture(root)
        return
    paths = sorted(root.glob(source.pattern))
    for number, path in enumerate(paths):
        if path.is_symlink() or path.relative_to(root).parts[0] in _LEFT_OUT:
            continue
        text = source.read(path)
        if len(text) >= _MIN_CHARACTERS and "\0" not in text:  # fortunes have binary indices
            yield f"{number:04d}-{path.name}", text


def _scripture(root: Path) -> str:
    """Returns the whole text, which only the package's own program can read."""
    bible: list[Path | str] = [root / "usr/bin/bible", "-f", "-p", root / "usr/lib"]
    command = [*bible, "Gen1:1-Rev22:21"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
