"""Reports of runs that are written by hand, so that tests of what is shown train nothing."""

from __future__ import annotations

from dataclasses import replace

from cocktailsdk.choosing.profile import DeviceProfile, SubnetCost, Timing
from cocktailsdk.report.run import NetworkRow, RunReport

ROWS = (
    NetworkRow("dense", "dense", 0.0, 0.0, 0.99, 80_000, 1_500_000, 750_000, 0.98),
    NetworkRow("unstructured@0.2", "unstructured", 0.2, 0.20001, 0.985, 64_000, 1_500_000, 600_000, 0.97),
    NetworkRow("unstructured@0.5", "unstructured", 0.5, 0.5, 0.97, 40_000, 1_500_000, 380_000, 0.96),
    NetworkRow("2:4", "n:m", 0.5, 0.5, 0.98, 40_000, 1_500_000, 380_000, 0.96),
    NetworkRow("channel@0.25", "channel", 0.25, 0.25, 0.95, 46_000, 900_000, 450_000, 0.94),
    NetworkRow("channel@0.5", "channel", 0.5, 0.5, 0.9, 21_000, 400_000, 200_000, 0.9),
)
NAMES = [r.name for r in ROWS[1:]]
LAYERS = ("conv1", "layer1.0.conv1", "layer1.1.conv1", "fc")

HISTORY = {
    "rounds": [
        {"round": 0, "networks": [], "losses": [{"dense": 2.0}, {"dense": 0.9}], "metrics": {"dense": 0.9}},
        {
            "round": 1,
            "networks": ["unstructured@0.2", "2:4", "channel@0.25"],
            "losses": [{"dense": 0.7, "unstructured@0.2": 0.8, "2:4": 0.9, "channel@0.25": 1.1}] * 2,
            "metrics": {"dense": 0.95, "unstructured@0.2": 0.94, "2:4": 0.93, "channel@0.25": 0.91},
        },
        {
            "round": 2,
            "networks": ["unstructured@0.5", "2:4", "channel@0.5"],
            "losses": [{"dense": 0.5, "unstructured@0.5": 0.6, "2:4": 0.7, "channel@0.5": None}],
            "metrics": {},
        },
    ],
    "alphas": [0.4],
    "merged": [0.95],
    "curves": [
        {
            "round": 2,
            "points": [{"alpha": 1.0, "metric": 0.93}, {"alpha": 0.4, "metric": 0.95}, {"alpha": 0.1, "bound": 0.94}],
        }
    ],
    "judged": 12,
    "to_judge": 15,
    "steps": 30,
    "passes": 60,
}

REPORT = RunReport(
    networks=ROWS,
    bundle_bytes=437_500,
    dense_bytes=320_000,
    seconds=141.2,
    preset="digits",
    model="resnet8",
    seed=3,
    alphas=(0.4,),
    fingerprint="ab" * 32,
    environment={"torch": "2", "threads": "1"},
    configuration={"training": {"epochs": 2, "recipe": {"name": "paper"}}},
    history=HISTORY,
    masks={
        "layers": [{"name": f"{n}.weight", "shape": [4, 4]} for n in LAYERS],
        "sparsity": {n: [0.0, 0.25 * i, 0.5, 0.1234] for i, n in enumerate(NAMES)},
        "bytes": {"dense": 320_000, **{n: 200_000 - 10_000 * i for i, n in enumerate(NAMES)}},
        "names": NAMES,
        "overlap": [[1.0 if i == j else 0.5 for j in range(5)] for i in range(5)],
        "chance": [[1.0 if i == j else 0.25 for j in range(5)] for i in range(5)],
    },
    kept=(
        {"what": "weights", "where": "conv1", "reason": "it is the first convolution"},
        {"what": "channels", "where": "fc.weight", "reason": "they are an output of the model"},
    ),
)


def _measured(step: int, worst: float) -> dict[str, object]:
    losses = {name: 0.3 + worst * i / 5 for i, name in enumerate(("dense", *NAMES))}
    return {"step": step, "losses": losses, "shares": dict.fromkeys(("dense", *NAMES), 1 / 6)}


TRAINED = replace(
    REPORT,
    alphas=(),
    configuration={"training": {"epochs": 2, "recipe": {"name": "pretrained"}}},
    history={
        "rounds": [
            {
                "round": 1,
                "networks": NAMES,
                "losses": [{"dense": 0.5, "channel@0.5": 0.9}] * 2,
                "metrics": {},
                "made": {"dense": 1200, "unstructured@0.2": 300, "2:4": 450, "channel@0.5": 2100},
            }
        ],
        "measured": [_measured(0, 2.0), _measured(2500, 0.5), {**_measured(5000, 0.1), "losses": {"dense": None}}],
        "before": {"dense": 0.975},
        "steps": 6000,
        "passes": 6000,
    },
)
"""A run from trained weights that shares passes by need."""
OLD = replace(REPORT, configuration={}, history={}, masks={}, kept=(), alphas=())
"""As earlier releases wrote reports."""


def profile() -> DeviceProfile:
    """Two batch sizes on some machine."""
    costs = tuple(
        SubnetCost(
            r.name, r.pattern, r.sparsity, r.metric, r.params, r.flops, r.nonzero_macs, 4 * r.params,
            tuple(Timing(b, b * r.flops / 1e6, 0.9, 1.1, 1e3) for b in (1, 8)),
        )
        for r in ROWS
    )  # fmt: skip
    return DeviceProfile(costs, "Net", "torch 2", 1, 20, {"processor": "a processor", "device": "cpu"})
