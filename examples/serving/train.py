"""Train the bundle that serve.py can be tried with: six widths of one network on scikit-learn's digits.

    python examples/serving/train.py [FOLDER]

Takes a few minutes on two cores; Ctrl-C saves, and the same command resumes.
"""

from __future__ import annotations

import sys
from pathlib import Path

from cocktail_serving.digits import MODEL, train
from rich.console import Console

import cocktailsdk as cocktail
from cocktailsdk.report.live import LineView


def main(folder: Path) -> None:
    console = Console(soft_wrap=not sys.stdout.isatty())
    view = LineView(console, "digits, wide")
    with view:
        bundle = train(folder, callbacks=[view])
    from cocktail_serving.digits import model

    net = cocktail.from_pretrained(bundle, model())
    for s in net.subnets():
        console.print(f"{s.name:15} accuracy {s.metric:.4f}  {s.params:9,} parameters  {s.flops / 1e6:6.1f} MFLOPs")
    console.print(f"python examples/serving/serve.py {bundle} --model {MODEL}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/serving"))
