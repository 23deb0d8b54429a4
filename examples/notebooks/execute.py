"""Runs the notebooks and keeps in them what they print and draw.

    pip install "cocktailsdk[notebooks]"
    python examples/notebooks/execute.py [NAME …]

NAME is a notebook without `.ipynb`; all of them if none. Cells tagged `varies` show the machine's speed, so their
output is not kept: what is kept is the same on the next run.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parent


def main(names: list[str]) -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # sums are then in the same order everywhere
    for name in names or sorted(path.stem for path in FOLDER.glob("*.ipynb")):
        path = FOLDER / f"{name}.ipynb"
        notebook = nbformat.read(path, as_version=4)
        with tempfile.TemporaryDirectory() as work:
            client = NotebookClient(
                notebook,
                timeout=300,
                record_timing=False,
                coalesce_streams=True,
                resources={"metadata": {"path": work}},
            )
            client.execute()
        for cell in (c for c in notebook.cells if c.cell_type == "code"):
            varies = "varies" in cell.metadata.get("tags", ())
            # What goes to stderr is about the packages of the machine.
            cell["outputs"] = [o for o in cell.get("outputs", ()) if not varies and o.get("name") != "stderr"]
        notebook.metadata["language_info"] = {"name": "python"}  # without the version that ran it
        nbformat.validate(notebook)
        nbformat.write(notebook, path)
        print(path.name)


if __name__ == "__main__":
    main(sys.argv[1:])
