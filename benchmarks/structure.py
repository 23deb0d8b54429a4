"""The structure of the package in figures: import circles, the walk of a batch and of a mask, sizes.

    python benchmarks/structure.py
    python benchmarks/structure.py --package ../older-checkout/cocktailsdk    # the same figures of another checkout

A file belongs to an import circle if it imports itself by way of other files; imports inside functions and for type
checkers count. A batch passes a file if a function there is called with the batch's memory during one optimizer step. A
mask passes a file if a function there is called with a mask, in any form, while subnetworks are made and saved. Needs
grimp, which ``import-linter`` brings.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import io
import json
import os
import sys
import tempfile
import tokenize
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

HERE = Path(__file__).resolve().parent.parent / "cocktailsdk"


def main() -> None:
    """Print the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--package", type=Path, default=HERE, help="the folder of the package (default: this one)")
    package = parser.parse_args().package.resolve()
    sys.path[:0] = [str(package.parent), str(package.parent / "adapters")]
    print(json.dumps({**sizes(package), **circles(), **walks(package)}, indent=1))


def circles() -> dict[str, Any]:
    """Files that are part of an import circle."""
    import grimp

    graph = grimp.build_graph("cocktailsdk", cache_dir=None)
    imports = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    return {"files in import circles": sum(reaches_itself(module, imports) for module in imports)}


def reaches_itself(start: str, imports: Mapping[str, set[str]]) -> bool:
    """Whether a module imports itself by way of others."""
    seen: set[str] = set()
    waiting = [*imports[start]]
    while waiting:
        module = waiting.pop()
        if module == start:
            return True
        if module not in seen:
            seen.add(module)
            waiting += imports[module]
    return False


def sizes(package: Path) -> dict[str, Any]:
    """Lines of code (without docstrings, comments and blank lines), comments, and the longest file."""
    files = sorted(package.rglob("*.py"))
    code = comments = 0
    lengths = {}
    for file in files:
        text = file.read_text("utf-8")
        lengths[file.relative_to(package).as_posix()] = text.count("\n")
        lines = set()
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type == tokenize.COMMENT:
                comments += 1
            elif token.string.strip() and token.type != tokenize.ENDMARKER:
                lines.update(range(token.start[0], token.end[0] + 1))
        code += len(lines - docstring_lines(ast.parse(text)))
    longest = max(lengths, key=lengths.__getitem__)
    return {
        "files": len(files),
        "code lines": code,
        "comments per 1,000 code lines": round(1000 * comments / code, 1),
        "median file": sorted(lengths.values())[len(lengths) // 2],
        "longest file": {longest: lengths[longest]},
        "files over 400 lines": sum(length > 400 for length in lengths.values()),
        "modules at the top": sum("/" not in name for name in lengths),
    }


def docstring_lines(tree: ast.Module) -> set[int]:
    """The lines of all docstrings, attributes' included."""
    lines: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            lines.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return lines


def walks(package: Path) -> dict[str, Any]:
    """Files that a batch and a mask pass."""
    import torch
    from torch import nn

    import cocktailsdk as cocktail

    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.Flatten(), nn.Linear(256, 4)
    )
    data = [(torch.randn(8, 3, 8, 8), torch.randint(4, (8,))) for _ in range(4)]
    memory = {tensor.data_ptr() for batch in data for tensor in batch}

    def of_batch(value: Any) -> bool:
        return isinstance(value, torch.Tensor) and value.numel() > 0 and value.data_ptr() in memory

    def of_mask(value: Any) -> bool:
        return isinstance(value, cocktail.Mask) or (isinstance(value, torch.Tensor) and value.dtype == torch.bool)

    with files_called_with(package, of_mask) as mask_files, tempfile.TemporaryDirectory() as folder:
        net = cocktail.sparsify(model, ["unstructured", "2:4"], example_inputs=data[0][0])
        net.save_pretrained(Path(folder) / "bundle")

    batch_files: set[str] = set()
    with ExitStack() as stack:

        def watch(event: Any) -> None:
            if type(event).__name__ == "TrainingStarted":
                stack.enter_context(files_called_with(package, of_batch, batch_files))
            elif type(event).__name__ == "EpochEnded":  # evaluation and statistics are other walks
                stack.close()

        cocktail.CoTrainer(
            net, data, nn.functional.cross_entropy, val_loader=data,
            start="pretrained", recipe="cocktail", epochs=1, callbacks=[watch],
        ).fit()  # fmt: skip
    return {
        "files that a batch passes": len(batch_files),
        "these": sorted(batch_files),
        "files that a mask passes": len(mask_files),
        "and these": sorted(mask_files),
    }


@contextmanager
def files_called_with(
    package: Path, wanted: Callable[[Any], bool], files: set[str] | None = None
) -> Iterator[set[str]]:
    """The package's files in which a function is called with a wanted value, directly or in a container."""
    found = set() if files is None else files
    root = f"{package}{os.sep}"

    def profile(frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event != "call" or not code.co_filename.startswith(root):
            return
        count = code.co_argcount + code.co_kwonlyargcount + bool(code.co_flags & inspect.CO_VARARGS)
        if any(holds(frame.f_locals.get(name), wanted) for name in code.co_varnames[:count] if name != "self"):
            found.add(code.co_filename.removeprefix(root))

    sys.setprofile(profile)
    try:
        yield found
    finally:
        sys.setprofile(None)


def holds(value: Any, wanted: Callable[[Any], bool], depth: int = 3) -> bool:
    """Whether a value is wanted, or holds one that is, in lists, tuples and mappings."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return depth > 0 and any(holds(v, wanted, depth - 1) for v in value[:64])
    return wanted(value)


if __name__ == "__main__":
    main()
