"""Prints which of hata's requirements this Python lacks, one a line, for `pip install`.

Reads pyproject.toml: what the build and the package need, and the extras named as arguments. torch
is left out, because pip's choice of it can be gigabytes of another build. A program on the PATH
serves for cmake and ninja.

    python .ci/missing_requirements.py transformers test
"""

import importlib.metadata
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from pip._vendor.packaging.requirements import Requirement
from pip._vendor.packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    from pip._vendor import tomli as tomllib

PROGRAMS = ("cmake", "ninja")


def requirements(extras: list[str]) -> Iterator[Requirement]:
    pyproject = tomllib.loads(Path(__file__).parents[1].joinpath("pyproject.toml").read_text())
    project = pyproject["project"]
    lines = [*pyproject["build-system"]["requires"], *project["dependencies"]]
    for extra in extras:
        lines += project["optional-dependencies"][extra]
    for requirement in map(Requirement, lines):
        if canonicalize_name(requirement.name) == project["name"]:  # an extra that names others
            yield from requirements(sorted(requirement.extras))
        elif requirement.name != "torch":
            yield requirement


def program_version(name: str) -> str | None:
    if name not in PROGRAMS or shutil.which(name) is None:
        return None
    said = subprocess.run([name, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"\d+\.\d+(\.\d+)?", said)
    return found.group() if found else None


def installed_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return program_version(name)


def main() -> None:
    missing = set()
    for requirement in requirements(sys.argv[1:]):
        version = installed_version(requirement.name)
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            missing.add(str(requirement))
    print("\n".join(sorted(missing)))


if __name__ == "__main__":
    main()
