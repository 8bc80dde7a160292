"""Installs a wheel of hata into fresh environments and runs the README's whole example there.

The environments are of the oldest and of the newest Python of this machine for which pip finds the
given torch. No compiler takes part: pip is told to take wheels alone.

    python .ci/try_wheel.py dist/hata_attention-0.1.0-cp310-abi3-linux_x86_64.whl torch==2.13.0
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
OLDEST_MINOR = 10
PYENV = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))


def pythons() -> list[str]:
    """The machine's Python 3.10, 3.11, ..., one of each; pyenv's own before its shims."""
    folders = [*map(str, PYENV.glob("versions/*/bin")), os.environ["PATH"]]
    found = [shutil.which(f"python3.{i}", path=":".join(folders)) for i in range(OLDEST_MINOR, 30)]
    return [python for python in found if python]


def failure(*command: str | Path, cwd: Path = ROOT) -> str | None:
    """The last line that a command said, where it failed."""
    done = subprocess.run(
        command, cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    return (done.stdout.strip() or "no output").splitlines()[-1] if done.returncode else None


def serves(python: str, wheel: Path, torch: str) -> bool:
    """Whether torch is to be had for this Python; the wheel must then install and work."""
    readme = (ROOT / "README.md").read_text()
    block = re.search(r"```python\n(import torch\nimport hata\n.*?)```", readme, re.DOTALL)
    example = block.group(1)
    with tempfile.TemporaryDirectory() as folder:
        fresh = Path(folder, "venv/bin/python")
        empty = Path(folder, "empty")
        empty.mkdir()
        pip = (fresh, "-m", "pip", "install", "--quiet", "--no-compile", "--only-binary=:all:")
        if said := failure(python, "-m", "venv", f"{folder}/venv") or failure(*pip, torch):
            print(f"{python}: left out, {torch} does not install there: {said}", flush=True)
            return False
        if said := failure(*pip, wheel) or failure(fresh, "-I", "-c", example, cwd=empty):
            raise SystemExit(f"{python}: {wheel.name} does not work: {said}")
    print(f"{python}: {wheel.name} installs and runs the README's example", flush=True)
    return True


def main() -> None:
    wheel, torch = Path(sys.argv[1]).resolve(), sys.argv[2]
    oldest = next((p for p in pythons() if serves(p, wheel, torch)), None)
    if oldest is None:
        raise SystemExit(f"error: {torch} installs in no Python of this machine: {pythons()}")
    next(p for p in reversed(pythons()) if p == oldest or serves(p, wheel, torch))


if __name__ == "__main__":
    main()
