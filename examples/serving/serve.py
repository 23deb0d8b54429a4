"""Serve a bundle, and hold a latency goal by going from one of its networks to another as load changes.

    python examples/serving/serve.py BUNDLE [--model MODEL] [--goal-ms 100] [--port 8000]

MODEL says how the bundle's model is built: a timm name, hf:TYPE_OR_PATH, torchvision:NAME or package.module:factory; it
may be left out where the bundle or the run beside it knows. Then:

    POST /predict        an array as numpy.save writes it (Content-Type: application/x-npy), one or more examples
    GET  /               a live page
    GET  /metrics        for Prometheus
    GET  /health/live, /health/ready

It listens on this machine alone unless --host says otherwise: whoever can reach it may use it. SIGTERM and Ctrl-C end
it once the requests that were let in are answered.
"""

from __future__ import annotations

import argparse
import logging
import math
import sys
from pathlib import Path

from cocktailsdk.utils.optional import missing

# before the imports below, which would end in a traceback
if message := missing("fastapi", "prometheus_client", "uvicorn", purpose="serving"):
    sys.exit(f"error: {message}")

import torch
from cocktail_serving.app import create_app
from cocktail_serving.controller import Controller, Policy, Rung
from cocktail_serving.engine import Engine
from cocktail_serving.inputs import Expected
from cocktail_serving.networks import example_of, networks_of
from cocktail_serving.server import server_of
from cocktail_serving.settings import Limits

from cocktailsdk.cli.nets import load_net
from cocktailsdk.errors import CocktailError

log = logging.getLogger("serve")


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s", stream=sys.stderr)
    torch.set_num_threads(options.threads)
    sys.setswitchinterval(0.0005)  # the network's thread is short of the interpreter's lock, not of work
    limits = Limits(**{name: getattr(options, name) for name in vars(Limits())})
    try:
        net = load_net(options.bundle, options.model)
        expected = Expected.of(example_of(net), limits.batch)
        networks = networks_of(net, options.pattern, options.only, batch=options.typical_batch)
    except (CocktailError, ValueError) as error:
        print(f"serve.py: {error}", file=sys.stderr)
        return 1
    for n in networks:
        accuracy = "" if n.accuracy is None else f", accuracy {n.accuracy:.4f}"
        milliseconds = 1e3 * n.seconds * options.typical_batch
        log.info("%s: %.2f ms for a batch of %d%s", n.name, milliseconds, options.typical_batch, accuracy)
    controller = Controller([Rung(n.name, n.seconds) for n in networks], Policy(goal=options.goal_ms / 1e3))
    app = create_app(Engine({n.name: n for n in networks}, controller, queue=limits.queue), expected, limits)
    server_of(app, limits, host=options.host, port=options.port, access_log=False).run()
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--model", help="how the bundle's model is built")
    parser.add_argument("--goal-ms", type=float, default=100.0, help="from a request's arrival to its answer")
    parser.add_argument("--pattern", default="channel", help="whose networks are served besides the dense one")
    parser.add_argument("--only", action="append", default=[], metavar="NETWORK", help="just this; may be repeated")
    parser.add_argument("--typical-batch", type=int, default=1, help="of most requests; networks are timed on it")
    parser.add_argument("--threads", type=int, default=1, help="that share a network's work")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    for name, default in vars(Limits()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default, help="a limit")
    options = parser.parse_args(arguments)
    for name in ("goal_ms", "typical_batch", "threads", *vars(Limits())):
        if not 0 < getattr(options, name) < math.inf:
            parser.error(f"--{name.replace('_', '-')} must be above 0 and finite, not {getattr(options, name)}")
    if not 0 <= options.port < 2**16:
        parser.error(f"--port must lie in 0 … 65535, not {options.port}")
    return options


if __name__ == "__main__":
    sys.exit(main())
