"""What of a detector can be pruned, what its networks cost, how long they take; and backbones, or all of DETR, as ONNX.

    python analyze_model.py --config-file configs/mask_rcnn_R_50_FPN.yaml [--tasks prunable cost] [KEY VALUE …]
    python analyze_model.py --config-file … --tasks export --networks channel@0.469

Looks at the networks that OUTPUT_DIR holds, or at untrained ones where there are none yet.
"""

from __future__ import annotations

import argparse
import sys
from functools import cache
from pathlib import Path

from cocktailsdk.utils.optional import missing

# before the imports below, which would end in a traceback
if message := missing("yaml", "pycocotools", "torchvision", "matplotlib", purpose="detection", extra="detection"):
    sys.exit(f"error: {message}")

from cocktail_detection.analysis import cost_table, export_network, left_whole, prunable_table
from cocktail_detection.catalog import DatasetError, register_builtin, register_from
from cocktail_detection.config import ConfigError, get_cfg
from cocktail_detection.data import example_images
from cocktail_detection.engine import Setup
from rich.console import Console

from cocktailsdk import CocktailError

TASKS = ("prunable", "cost", "export")


def main(arguments: list[str] | None = None) -> int:
    """The command; its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", type=Path, required=True, metavar="FILE", help="YAML; see configs/")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=["prunable", "cost"])
    parser.add_argument("--networks", nargs="+", default=[], metavar="NAME", help="for cost and export; default: all")
    parser.add_argument("--repeats", type=int, default=5, help="passes of which the median time is taken")
    parser.add_argument("--classes", type=int, default=0, help="of an untrained model; default: those of the data set")
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="settings, after --")
    options = parser.parse_args(arguments)
    console = Console(width=160)
    try:
        cfg = get_cfg()
        cfg.merge_from_file(options.config_file)
        cfg.merge_from_list([word for word in options.opts if word != "--"])
        register_builtin(cfg.DATASETS.ROOT)
        register_from(cfg.DATASETS.REGISTER)
        setup = Setup.of(cfg, options.classes)
        saved = (setup.out / "bundle").exists()
        net = setup.saved_net() if saved else setup.net()
        net.to(setup.device)
        image = example_images(cfg)[0].to(setup.device)
        slim = cache(net.slim)
        if "prunable" in options.tasks:
            fresh = setup.net() if saved else net  # a bundle does not hold the reasons
            console.print(prunable_table(fresh))
            for line in left_whole(fresh):
                console.print(line, highlight=False)
        if "cost" in options.tasks:
            console.print(cost_table(net, setup.architecture, [image], options.repeats, options.networks, slim))
        for name in (options.networks or net.names) if "export" in options.tasks else ():
            path = setup.out / "onnx" / f"{name.replace(':', '-')}.onnx"
            apart = export_network(net, name, image, path, slim)
            console.print(
                f"{path}: {path.stat().st_size:,} bytes, differs from PyTorch by {apart:.1e}", highlight=False
            )
    except (ConfigError, DatasetError, CocktailError) as error:
        Console(stderr=True, soft_wrap=True).print(f"[red]error[/red]: {error}", highlight=False)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
