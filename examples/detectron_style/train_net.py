"""Train one detector that is 24, measure all of them, and draw what they find.

    python train_net.py --config-file configs/mask_rcnn_R_50_FPN.yaml [--num-gpus N] [KEY VALUE …]
    python train_net.py --config-file … --resume       go on with the run of OUTPUT_DIR
    python train_net.py --config-file … --eval-only    measure the networks that OUTPUT_DIR holds

As Detectron2's script of that name; torchrun may start it, too: on several machines, or on processors (--num-gpus 0).
Ctrl-C finishes the step and saves. The folder OUTPUT_DIR then has the configuration, the run's state, the bundle of all
networks, metrics.json and detections.png.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path

from cocktailsdk.utils.optional import missing

# before the imports below, which would end in a traceback
if message := missing("yaml", "pycocotools", "torchvision", "matplotlib", purpose="detection", extra="detection"):
    sys.exit(f"error: {message}")

import torch
from cocktail_detection.catalog import DatasetError, register_builtin, register_from
from cocktail_detection.config import Config, ConfigError, get_cfg
from cocktail_detection.engine import (
    Metrics,
    Setup,
    Using,
    draw_networks,
    has_state,
    measured,
    trainer_of,
    write_metrics,
)
from cocktail_detection.tables import metrics_table, summary
from rich.console import Console
from torch import distributed as dist

import cocktailsdk as cocktail
from cocktailsdk import CocktailError
from cocktailsdk.io.atomic import write_atomic
from cocktailsdk.report.live import run_view_for
from cocktailsdk.training.events import Event


def main(arguments: list[str] | None = None) -> int:
    """The command; its exit status."""
    given = sys.argv[1:] if arguments is None else arguments
    options = parse(given)
    try:
        cfg = configured(options)
        if options.num_gpus > 1 and "LOCAL_RANK" not in os.environ:
            return launch(options.num_gpus, given)
        status = run(Setup.of(cfg), options)
        leave_processes()
        return status
    except (ConfigError, DatasetError, CocktailError) as error:
        Console(stderr=True, soft_wrap=True).print(f"[red]error[/red]: {error}", highlight=False)
        return 1
    except KeyboardInterrupt:
        Console(stderr=True).print("stopped and saved: the same command with --resume goes on")
        return 130


def launch(processes: int, arguments: list[str]) -> int:
    """This script in so many processes; 1 if one of them failed, which has said why."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    try:
        torchrun(["--standalone", f"--nproc-per-node={processes}", str(Path(__file__).resolve()), *arguments])
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        Console(stderr=True).print(f"process {rank} of {processes} ended with status {failure.exitcode}")
        return 1
    return 0


def leave_processes() -> None:
    """Close the connections to the other processes, if there are any, before Python ends under their threads."""
    if dist.is_available() and dist.is_initialized():
        gc.collect()  # models wrapped for several processes hold on to the connections
        dist.destroy_process_group()


def parse(arguments: list[str]) -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", type=Path, required=True, metavar="FILE", help="YAML; see configs/")
    parser.add_argument("--resume", action="store_true", help="go on with the run of OUTPUT_DIR, if there is one")
    parser.add_argument("--eval-only", action="store_true", help="measure the networks that OUTPUT_DIR holds")
    parser.add_argument("--num-gpus", type=int, default=min(1, torch.cuda.device_count()), help="0: on the processor")
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="settings: SOLVER.MAX_ITER 1000")
    options = parser.parse_args(arguments)
    if not 0 <= options.num_gpus <= torch.cuda.device_count():
        parser.error(f"--num-gpus is {options.num_gpus}, and there are {torch.cuda.device_count()}")
    return options


def configured(options: argparse.Namespace) -> Config:
    """The configuration; its data sets are registered."""
    cfg = get_cfg()
    cfg.merge_from_file(options.config_file)
    cfg.merge_from_list(options.opts)
    if not cfg.MODEL.DEVICE and options.num_gpus < 2 and "LOCAL_RANK" not in os.environ:
        cfg.MODEL.DEVICE = "cuda" if options.num_gpus else "cpu"
    register_builtin(cfg.DATASETS.ROOT)
    register_from(cfg.DATASETS.REGISTER)
    return cfg


def run(setup: Setup, options: argparse.Namespace) -> int:
    """Train, or only measure."""
    console = Console(soft_wrap=not sys.stdout.isatty())
    if options.eval_only:
        net = setup.saved_net().to(setup.device)
        report(console, setup, net, measured(setup, net, note=console.print), net.using)
        return 0
    first = os.environ.get("RANK", "0") == "0"  # the others may come when this one has begun
    if first and has_state(setup.out) and not options.resume:
        raise ConfigError(
            f"{setup.out} holds a run already: go on with it (--resume), measure it (--eval-only), or name another "
            "folder (OUTPUT_DIR FOLDER)"
        )
    net = setup.net()
    views: list[Callable[[Event], None]] = []
    trainer = trainer_of(setup, net, [lambda event: [view(event) for view in views]])
    if trainer.ranks.is_main:
        setup.out.mkdir(parents=True, exist_ok=True)
        write_atomic(setup.out / "config.yaml", setup.cfg.dump().encode())
        title = f"{setup.cfg.MODEL.META_ARCHITECTURE} on {setup.train.name} · {len(net.names)} networks"
        with run_view_for(console, title, [net.subnet(name) for name in net.names]) as view:
            views.append(view)
            trainer.fit()
            net.save_pretrained(setup.out / "bundle")
            metrics = measured(setup, net, trainer.using, trainer.ranks, view.note)
        report(console, setup, net, metrics, trainer.using)
    else:
        trainer.fit()
        measured(setup, net, trainer.using, trainer.ranks)
    return 0


def report(console: Console, setup: Setup, net: cocktail.CocktailNet, metrics: Metrics, using: Using) -> None:
    """Print figures, write them, and draw."""
    console.print(metrics_table(net.subnets(), metrics))
    for line in summary(metrics):
        console.print(line)
    console.print(f"wrote {write_metrics(setup, metrics)}")
    if (path := draw_networks(setup, net, using)) is not None:
        console.print(f"drew {path}")


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    sys.exit(main())
