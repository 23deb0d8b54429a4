"""Checks constraints.txt, the versions that are installed for tests, or writes it anew.

python .ci/pins.py             every dependency and extra of pyproject.toml is pinned; exits with 1 if not
python .ci/pins.py --update    the newest releases, by uv (https://docs.astral.sh/uv), at most HIGHEST
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "constraints.txt"
HIGHEST = {"torch": "2.14.1", "torchvision": "0.29.1"}
"""Some machines offer no newer releases of these."""
PYTHONS = ("3.11.7", "3.12.1", "3.13.0")
SYSTEMS = {"linux": "posix", "darwin": "posix", "win32": "nt"}
LEFT_TO_TORCH = re.compile(r"^(nvidia-|cuda-|triton\b)")
ELSEWHERE = re.compile(r"sys_platform == 'emscripten'")


def main() -> int:
    """Run as a script."""
    if "--update" in sys.argv[1:]:
        update()
    faults = check(FILE.read_text(encoding="utf-8"), (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    for fault in faults:
        print(f"FAIL  {fault}")
    if not faults:
        print(f"ok    {len(pins(FILE.read_text(encoding='utf-8')))} pins in {FILE.name}")
    return int(bool(faults))


def check(constraints: str, pyproject: str) -> list[str]:
    """What is wrong with a constraints file, in words."""
    faults, lines = [], pins(constraints)
    for line in lines:
        exact = [s.version for s in line.specifier if s.operator == "=="]
        if len(exact) != 1 or len(list(line.specifier)) != 1 or line.url or "*" in exact[0]:
            faults.append(f"{line} is no exact version; write {line.name}==VERSION")
        elif Version(exact[0]).local:
            faults.append(f"{line} is a local version, which PyPI does not have")
        elif line.name in HIGHEST and Version(exact[0]) > Version(HIGHEST[line.name]):
            faults.append(f"{line} is above {HIGHEST[line.name]}, which not every machine offers")
    for wanted in requirements(pyproject):
        for python in PYTHONS:
            for system in SYSTEMS:
                faults += _unmet(wanted, [line for line in lines if applies(line, python, system)], python, system)
    return faults


def _unmet(wanted: Requirement, lines: list[Requirement], python: str, system: str) -> list[str]:
    name = canonicalize_name(wanted.name)
    versions = [s.version for line in lines if canonicalize_name(line.name) == name for s in line.specifier]
    where = f"for Python {python} on {system}"
    if len(versions) != 1:
        return [f"{wanted.name} has {len(versions)} pins {where}; one is needed"]
    if not wanted.specifier.contains(versions[0]):
        return [f"{wanted.name}=={versions[0]} {where} is not {wanted.specifier}, as pyproject.toml asks"]
    return []


def pins(constraints: str) -> list[Requirement]:
    """A constraints file's lines."""
    rows = (row.partition("#")[0].strip() for row in constraints.splitlines())
    return [Requirement(row) for row in rows if row]


def requirements(pyproject: str) -> list[Requirement]:
    """What a project and its extras ask for, and what builds it."""
    data = tomllib.loads(pyproject)
    project = data["project"]
    extras = [row for rows in project["optional-dependencies"].values() for row in rows]
    rows = [Requirement(row) for row in (*data["build-system"]["requires"], *project["dependencies"], *extras)]
    return [row for row in rows if row.name != project["name"]]


def applies(line: Requirement, python: str, system: str) -> bool:
    """Whether a line's marker holds for a Python on a system."""
    environment = {
        "python_version": python.rpartition(".")[0],
        "python_full_version": python,
        "sys_platform": system,
        "os_name": SYSTEMS[system],
    }
    return line.marker is None or line.marker.evaluate(environment)


def update() -> None:
    """Write the newest releases that go together."""
    head = "".join(row for row in FILE.read_text(encoding="utf-8").splitlines(keepends=True) if row.startswith("#"))
    with tempfile.TemporaryDirectory() as work:
        highest, out = Path(work) / "highest.txt", Path(work) / "pins.txt"
        highest.write_text("".join(f"{name}<={version}\n" for name, version in HIGHEST.items()))
        options = ["--all-extras", "--universal", "--python-version", "3.11", "--no-header", "--no-annotate"]
        command = ["uv", "pip", "compile", "pyproject.toml", *options, "-c", str(highest), "-o", str(out), "--quiet"]
        subprocess.run(command, check=True, cwd=ROOT)
        rows = out.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [row for row in rows if not LEFT_TO_TORCH.match(row) and not ELSEWHERE.search(row)]
    FILE.write_text(head + "".join(kept), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
