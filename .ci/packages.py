"""Builds the wheel and the sdist, looks into them, installs each into an empty environment and tries it there.

    python .ci/packages.py             everything that the package asks for is installed twice: gigabytes, minutes
    python .ci/packages.py --reuse     other packages are those of the Python that runs this: a minute

Needs a package registry for the build's backend, and without --reuse for everything else.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {"cocktailsdk": ROOT / "cocktailsdk", "cocktail_adapters": ROOT / "adapters" / "cocktail_adapters"}
BESIDE = {"CHANGELOG.md", "CITATION.cff", "LICENSE", "README.md", "pyproject.toml", ".gitignore", "PKG-INFO"}
SMOKE = """
import sys
from importlib.metadata import entry_points, metadata
from pathlib import Path

import cocktailsdk as cocktail

assert Path(sys.prefix) in Path(cocktail.__file__).parents, f"{cocktail.__file__} is not the installed package"
assert metadata("cocktailsdk")["License-Expression"] == "Apache-2.0"
assert {e.name for e in entry_points(group="cocktailsdk.adapters")} >= {"timm", "transformers", "torchvision"}
assert "torch" not in sys.modules

import torch
from torch import nn

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
x = torch.randn(2, 8)
net = cocktail.sparsify(model, ["unstructured@0.5", "2:4", "channel@0.5"], example_inputs=(x,))
with torch.no_grad():
    dense = net(x)
    for name in net.names:
        with net.using(name):
            masked = net(x)
        assert torch.allclose(net.slim(name)(x), masked, atol=1e-5), name
    net.save_pretrained("bundle")
    again = cocktail.from_pretrained("bundle", model)
    again.switch("2:4")
    assert cocktail.verify_nm(again, 2, 4).ok
    again.switch("dense")
    assert torch.equal(again(x), dense)
cocktail.CoTrainer(again, [(x, torch.tensor([0, 1]))], nn.functional.cross_entropy, epochs=1).fit()
print(f"cocktailsdk {cocktail.__version__} works with torch {torch.__version__} on Python {sys.version.split()[0]}")
"""


def main() -> None:
    """Build, look, install, try."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reuse", action="store_true", help="take other packages from the Python that runs this")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        backend = environment(folder / "backend")
        run(backend, "-m", "pip", "install", "--quiet", "hatchling>=1.25")
        wheel, sdist = build(backend, folder / "dist")
        for wrong in [*wheel_faults(wheel), *sdist_faults(sdist)]:
            sys.exit(f"FAIL  {wrong}")
        for package in (wheel, sdist):
            print(f"{package.name}: {package.stat().st_size:,} bytes")
            python = environment(folder / package.suffix[1:])
            if options.reuse:
                reuse(python)
            run(python, "-m", "pip", "install", "--quiet", *(["--no-deps"] if options.reuse else []), str(package))
            try_in(python, folder)


def environment(folder: Path) -> Path:
    """The Python of a new virtual environment."""
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    return folder / ("Scripts" if os.name == "nt" else "bin") / Path(sys.executable).name


def reuse(python: Path) -> None:
    """Let an environment see the packages of the Python that runs this, after its own."""
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = subprocess.run([python, "-c", ask], check=True, capture_output=True, text=True).stdout.strip()
    (Path(site) / "reused.pth").write_text(f"{sysconfig.get_path('purelib')}\n{sysconfig.get_path('platlib')}\n")


def build(python: str | Path, folder: Path) -> tuple[Path, Path]:
    """The wheel and the sdist, built with the backend that this Python has."""
    run(python, "-m", "hatchling", "build", "--directory", str(folder), where=ROOT)
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return wheel, sdist


def wheel_faults(wheel: Path) -> list[str]:
    """What a wheel lacks, and what it has that nobody should install."""
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (info,) = {n.partition("/")[0] for n in names if ".dist-info/" in n}
        entries = archive.read(f"{info}/entry_points.txt").decode()
    wanted = {f"{name}/{file}" for name, folder in PACKAGES.items() for file in files_of(folder)}
    wanted |= {"cocktailsdk/py.typed", "cocktail_adapters/py.typed", f"{info}/licenses/LICENSE"}
    faults = [f"the wheel lacks {name}" for name in sorted(wanted - names)]
    faults += [f"the wheel has {n}" for n in sorted(names - wanted) if not n.startswith(f"{info}/")]
    lines = ("cocktail-cli = cocktailsdk.cli.main:main", "[cocktailsdk.adapters]")
    return faults + [f"the wheel's entry points lack {line}" for line in lines if line not in entries]


def sdist_faults(sdist: Path) -> list[str]:
    """The same of an sdist, which holds what is needed to build and to install, and nothing else."""
    with tarfile.open(sdist) as archive:
        names = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    wanted = {(folder / f).relative_to(ROOT).as_posix() for folder in PACKAGES.values() for f in files_of(folder)}
    faults = [f"the sdist lacks {n}" for n in sorted((wanted | {"LICENSE", "pyproject.toml"}) - names)]
    return faults + [f"the sdist has {n}" for n in sorted(names - wanted - BESIDE)]


def files_of(folder: Path) -> set[str]:
    """A package's files."""
    found = (p.relative_to(folder) for p in folder.rglob("*") if p.is_file())
    return {p.as_posix() for p in found if "__pycache__" not in p.parts}


def try_in(python: Path, folder: Path) -> None:
    """Use what is installed, from a folder in which nothing of the repository lies."""
    work = folder / "elsewhere"
    work.mkdir()
    run(python, "-I", "-c", SMOKE, where=work)
    run(python.with_name("cocktail-cli"), "--version", where=work)
    run(python.with_name("cocktail-cli"), "subnets", "bundle", where=work)
    shutil.rmtree(work)


def run(*command: str | Path, where: Path | None = None) -> None:
    """Run a command; what fails ends this."""
    subprocess.run(command, check=True, cwd=where)


if __name__ == "__main__":
    main()
