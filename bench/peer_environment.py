"""A virtual environment for each peer, made when it is first needed, from pinned requirements."""

from __future__ import annotations

import subprocess
import sys
import venv
from importlib.metadata import version
from pathlib import Path

PEERS = Path(__file__).parent / "peers"
# The CPU build of torch that Attar itself is tested with; a peer that asks for another says so.
TORCH = "torch==2.13.0"


def environment(peer: str) -> Path:
    """Python of a peer's environment.

    Raises:
        SystemExit: It could not be made; pip's last lines are shown.
    """
    folder = PEERS / peer / ".venv"
    python, ready = folder / "bin" / "python", folder / ".ready"
    if ready.exists():
        return python
    print(f"making the environment of {peer}", flush=True)
    venv.create(folder, with_pip=True, clear=True)
    constraint = folder / "constraints.txt"
    constraint.write_text(TORCH + "\n", encoding="utf-8")
    requirements = PEERS / peer / "requirements.txt"
    install = [str(python), "-m", "pip", "install", "--quiet", "-c", str(constraint), TORCH]
    _run([*install, "-r", str(requirements)])
    if (PEERS / peer / "package.json").exists():
        _run(["npm", "install", "--silent", "--prefix", str(PEERS / peer)])
    ready.touch()
    return python


def version_of(tool: str) -> str:
    """Of the first requirement of a peer, or of Attar itself."""
    if tool.startswith("attar"):
        return version("attar")
    package = PEERS / tool / "package.json"
    if package.exists():
        return package.read_text("utf-8").partition('linux-x64": "')[2].partition('"')[0]
    first = (PEERS / tool / "requirements.txt").read_text("utf-8").splitlines()[0]
    return first.partition("==")[2]


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
