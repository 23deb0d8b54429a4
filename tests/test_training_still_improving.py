"""What the middle of a run says about a longer one."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from training_tiny import tiny_images, tiny_net, tiny_trainer, to_float

from cocktailsdk.training import events as ev
from cocktailsdk.training.recipes import Recipe
from cocktailsdk.training.step.distill import untouched_buffers
from cocktailsdk.training.still_improving import Improvement, Measurement, improvement_warning, still_improving

FRACTIONS = (0, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 1)


def power(exponent: float, total: int, first: float = 2.0, decayed: float = 0.8) -> list[Measurement]:
    """A loss that falls as a power of the steps, then by the decay of the rate."""
    steps = [round(f * total) for f in FRACTIONS[1:-1]]
    losses = [first * (step / steps[0]) ** -exponent for step in steps]
    return [
        Measurement(0, 1.5 * first),
        *(Measurement(step, loss) for step, loss in zip(steps, losses, strict=True)),
        Measurement(total, decayed * losses[-1]),
    ]


def test_a_power_of_the_steps_is_read_from_the_middle_and_applied_to_the_end() -> None:
    measured = power(0.5, 400)
    (found,) = still_improving({"channel@0.613": measured}, 400)
    assert found.subnet == "channel@0.613" and found.steps == 100
    assert found.doubling == pytest.approx(1 - 2**-0.5)
    assert found.loss == pytest.approx(measured[-1].loss * (1 - 1.25**-0.5))
    assert found.points is None


@pytest.mark.parametrize(
    "losses",
    [
        [1.0] * 6,  # nothing to gain, whatever the decay brought
        [1.0, 1.1, 1.2, 1.3, 1.3, 1.4],  # harmed by the full rate
        [1.0, 1.3, 0.8, 1.2, 0.9, 1.1],  # noise
        [1.0, 0.995, 0.99, 0.985, 0.98, 0.975],  # less than is worth a word
        [0.0, 0.0, 0.0, 0.0, 0.0, 0.0],
        [-1.0, -2.0, -3.0, -4.0, -5.0, -6.0],  # no loss that has a power law
        [math.nan] * 6,
        [math.inf, 1.0, math.nan, math.inf, math.nan, 0.5],  # two are left
    ],
)
def test_a_longer_run_is_not_advised_where_the_middle_does_not_say_so(losses: list[float]) -> None:
    steps = [round(f * 400) for f in FRACTIONS[1:-1]]
    measured = [Measurement(s, x) for s, x in zip(steps, losses, strict=True)]
    assert still_improving({"2:4": [Measurement(0, 3.0), *measured, Measurement(400, 0.4)]}, 400) == []


def test_too_few_measurements_and_those_of_the_ends_say_nothing() -> None:
    assert still_improving({}, 100) == []
    assert still_improving({"2:4": []}, 100) == []
    ends = [Measurement(0, 3.0), Measurement(5, 2.0), Measurement(90, 1.0), Measurement(95, 0.5), Measurement(100, 0.3)]
    assert still_improving({"2:4": ends}, 100) == []
    # fifty steps are measured at 0 and half of them only
    assert still_improving({"2:4": [Measurement(0, 3.0), Measurement(25, 1.0), Measurement(50, 0.5)]}, 50) == []


def test_one_bad_measurement_does_not_count() -> None:
    measured = power(0.4, 1000)
    (clean,) = still_improving({"n": measured}, 1000)
    measured[3] = Measurement(measured[3].step, 5 * measured[3].loss)
    (found,) = still_improving({"n": measured}, 1000)
    assert found.doubling == pytest.approx(clean.doubling, rel=0.4)
    assert still_improving({"n": measured[::-1]}, 1000) == [found]


def with_accuracy(first: float, last: float) -> list[Measurement]:
    measured = power(0.5, 400)
    return [
        Measurement(0, measured[0].loss, first),
        *measured[1:-1],
        Measurement(400, measured[-1].loss, last),
    ]


def test_points_come_from_accuracies_and_are_a_share_of_what_is_left() -> None:
    measured = power(0.5, 400)
    drop, share = measured[0].loss - measured[-1].loss, 1 - 1.25**-0.5
    (found,) = still_improving({"n": with_accuracy(0.2, 0.6)}, 400)
    assert found.points == pytest.approx(min(100 * 0.4 / drop * found.loss, 40 * share))
    best = Measurement(0, 0.01, 0.65)
    (found,) = still_improving({"n": with_accuracy(0.2, 0.6)}, 400, best)
    assert found.points == pytest.approx(5 * share)
    (found,) = still_improving({"n": with_accuracy(0.2, 0.6)}, 400, best, {"n": 0.61})
    assert found.points == pytest.approx(4 * share)


@pytest.mark.parametrize(("first", "last"), [(0.7, 0.6), (0.2, 1.0), (0.2, 0.995)])
def test_gains_below_a_third_of_a_point_are_silent(first: float, last: float) -> None:
    assert still_improving({"n": with_accuracy(first, last)}, 400) == []


def test_a_network_as_good_as_the_dense_one_has_nothing_to_gain() -> None:
    assert still_improving({"n": power(0.5, 400)}, 400, Measurement(0, 2.0)) == []
    assert still_improving({"n": with_accuracy(0.2, 0.9)}, 400, Measurement(0, 0.1, 0.9)) == []


def test_measurements_must_span_the_middle_of_the_run() -> None:
    early = [m for m in power(0.5, 400) if m.step <= 200]
    assert still_improving({"n": early}, 400) == []
    assert still_improving({"n": power(0.5, 40)}, 40) == []


@pytest.mark.parametrize(
    ("total", "steps", "said"),
    [(50, 100, "a hundred"), (400, 100, "a hundred"), (5000, 1000, "a thousand"), (200_000, 100_000, "100,000")],
)
def test_the_sentence_counts_steps_in_a_unit_that_fits_the_run(total: int, steps: int, said: str) -> None:
    (found,) = still_improving({"2:4": power(0.3, total)}, total)
    assert found.steps == steps
    assert str(found).startswith("2:4's held-out loss still falls by up to about ") and str(found).endswith(
        f"{said} steps"
    )


def test_the_warning_names_the_largest_gain_and_counts_the_others() -> None:
    one = Improvement("channel@0.613", 100, 0.1, 0.43, 0.2)
    other = Improvement("2:4", 100, 0.1, 0.2, 0.3)
    assert improvement_warning([]) is None
    assert (
        improvement_warning([one])
        == "channel@0.613 still gains up to about 0.4 points a hundred steps: more steps will pay"
    )
    assert improvement_warning([one, other]) == (
        "channel@0.613 still gains up to about 0.4 points a hundred steps, and 1 other still improves: "
        "more steps will pay"
    )
    assert "and 2 others still improve:" in str(improvement_warning([one, other, other]))
    measured = {"2:4": power(0.2, 400), "channel@0.613": power(0.6, 400), "1:2": power(0.4, 400)}
    assert [i.subnet for i in still_improving(measured, 400)] == ["channel@0.613", "1:2", "2:4"]


def test_subnetworks_of_a_real_run_that_are_named_are_better_after_twice_the_steps() -> None:
    images, labels = to_float(tiny_images(96, seed=1).images), tiny_images(96, seed=1).labels
    recipe = Recipe(name="one", rounds="one", masks="own", merging="none", schedule="rotation")

    def measured_run(total: int) -> dict[str, list[Measurement]]:
        net = tiny_net()
        at = {round(f * total) for f in FRACTIONS}
        measured: dict[str, list[Measurement]] = {name: [] for name in net.names}

        def look(event: Any) -> None:
            if not isinstance(event, ev.StepDone) or event.done_steps not in at:
                return
            for name, of in measured.items():
                with net.using(name), torch.no_grad(), untouched_buffers(net.model):
                    of.append(Measurement(event.done_steps, float(F.cross_entropy(net.model(images), labels))))

        run = tiny_trainer(
            net,
            recipe=recipe,
            start="pretrained",
            optimizer="sgd",
            learning_rate=0.05,
            epochs=None,
            total_steps=total,
            rewind_epoch=None,
            merge=False,
            val_loader=None,
            callbacks=[look],
        )
        run.fit()
        return measured

    short, long = measured_run(80), measured_run(160)
    found = still_improving(short, 80)
    assert len(found) >= 4
    better = [long[one.subnet][-1].loss < short[one.subnet][-1].loss for one in found]
    assert all(better)
    assert improvement_warning(found) is not None
