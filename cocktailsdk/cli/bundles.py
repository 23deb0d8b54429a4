"""Finding bundles on the command line."""

from __future__ import annotations

from pathlib import Path

from ..bundle.files import is_bundle
from ..errors import BundleError
from ..report.run import RunReport, read_report

__all__ = ["bundle_folder", "run_report"]

MARK = "bundle.json"


def bundle_folder(path: Path) -> Path:
    """The bundle that a path means: itself, or the one in a run's folder.

    Raises:
        BundleError: There is none.
    """
    for folder in (path, path / "bundle"):
        if is_bundle(folder):
            return folder
    if not path.exists():
        raise BundleError(f"{path} does not exist; give a bundle's folder, or the folder of a finished run")
    raise BundleError(f"{path} holds no bundle ({MARK} is neither in it nor in {path / 'bundle'})")


def run_report(bundle: Path) -> RunReport | None:
    """The report of the run that made a bundle; ``None`` where it is not beside the bundle."""
    return read_report(bundle.resolve().parent)
