"""Training on two processes of this machine (gloo): the same as on one, and the same in both."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import ranks_program
import torch
from ranks_program import ROUNDING, launch, outcome, plain_trainer
from torch import Tensor
from training_tiny import assert_identical

from cocktailsdk import TrainingError
from cocktailsdk.training import events as ev
from cocktailsdk.training.distributed.ranks import SINGLE, Ranks
from cocktailsdk.training.distributed.sharing import examples, held_out_loader, part_of, shared_loader

needs_gloo = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="PyTorch was built without gloo",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes made of the scenarios."""
    folder = tmp_path_factory.mktemp("two")
    begin_alone(folder / "grown")
    done = launch(folder, *(scenario.__name__ for scenario in ranks_program.DDP))
    assert done.returncode == 0, done.stderr
    return folder


def begin_alone(folder: Path) -> None:
    """A run of one process that is interrupted in its second round."""

    def stop(event: ev.Event) -> None:
        if isinstance(event, ev.RoundStarted) and event.round == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        plain_trainer(out_dir=folder, callbacks=[stop]).fit()


def alone(name: str, folder: Path) -> Any:
    return ranks_program.SCENARIOS[name](folder)


def losses(run: Any) -> list[float]:
    return [loss for k in run["history"]["rounds"] for epoch in k["losses"] for loss in epoch.values()]


@needs_gloo
@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain", "loader", "several", "from_trained", "scored"])
def test_two_processes_train_as_one_with_the_same_batches(name: str, folder: Path, tmp_path: Path) -> None:
    two, one = outcome(folder, name, 0), alone(name, tmp_path)
    assert losses(two) == pytest.approx(losses(one), abs=ROUNDING)
    assert_identical(two["masks"], one["masks"])
    for key, tensor in one["weights"].items():
        assert torch.allclose(two["weights"][key], tensor, rtol=0, atol=ROUNDING), key
    # hits are counted: every example once, though batches do not divide by two
    assert two["metrics"] == one["metrics"]
    assert two["evaluated"] == one["evaluated"]
    assert two["history"]["alphas"] == one["history"]["alphas"]


@needs_gloo
@pytest.mark.slow
def test_processes_whose_loops_judge_scores_from_other_data_are_told_so(folder: Path) -> None:
    for rank in (0, 1):
        assert "the calibration data, or the masks that are made from it" in outcome(folder, "scored_apart", rank)


@needs_gloo
@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "plain",
        "loader",
        "several",
        "from_trained",
        "scored",
        "own_heads",
        "batch_norm",
        "mixed",
        "unused",
        "planned",
        "own_parts",
    ],
)
def test_weights_masks_statistics_and_decisions_are_the_same_bits_in_both(name: str, folder: Path) -> None:
    first, second = outcome(folder, name, 0), outcome(folder, name, 1)
    assert first["digest"] == second["digest"]
    assert first["evaluated"] == second["evaluated"]


@needs_gloo
@pytest.mark.slow
def test_a_plan_is_measured_together_and_agreed(folder: Path) -> None:
    first, second = outcome(folder, "planned", 0), outcome(folder, "planned", 1)
    assert first["hours"] == second["hours"]
    assert first["hours"]["epochs"] >= 1
    assert first["steps"] == second["steps"] == first["history"]["steps"]


@needs_gloo
@pytest.mark.slow
def test_an_interrupt_of_one_stops_both_and_they_go_on_identically(folder: Path) -> None:
    main, other = outcome(folder, "interrupted", 0), outcome(folder, "interrupted", 1)
    assert main.pop("stopped") and other.pop("stopped")
    assert main.pop("seen")[-1] == "Saved"
    assert other.pop("seen") == []  # the main process alone tells
    uninterrupted = outcome(folder, "batch_norm", 0)
    assert_identical(main, uninterrupted)
    assert_identical(other, uninterrupted)


@needs_gloo
@pytest.mark.slow
def test_what_cannot_be_shared_out_is_refused_in_both(folder: Path) -> None:
    for rank in (0, 1):
        said = outcome(folder, "refused", rank)
        assert "every example counts once" in said["padded"]
        assert "shard_loader=False" in said["texts"]
        assert "cuda" in said["synchronised"]
        assert "another configuration" in said["folder"]


@needs_gloo
@pytest.mark.slow
def test_the_command_line_trains_on_two_processes_and_writes_once(folder: Path) -> None:
    main, other = outcome(folder, "cli", 0), outcome(folder, "cli", 1)
    report = json.loads(main["first"][0])
    assert [n["name"] for n in report["networks"]] == ["dense", "unstructured@0.5", "unstructured@0.8", "2:4"]
    assert "round 1" in main["first"][1]
    assert main["again"][0] == main["first"][0]
    assert "finished" in main["again"][1]
    assert all(out == "" and "round" not in err for out, err in other.values())
    assert {p.name for p in (folder / "cli").iterdir()} == {"bundle", "networks.png", "report.json", "state"}


@needs_gloo
@pytest.mark.slow
def test_a_run_whose_process_was_killed_goes_on_with_fewer(tmp_path: Path) -> None:
    done = launch(tmp_path, "dies")
    assert done.returncode != 0
    assert "lost another one" in done.stderr or "SIGKILL" in done.stderr
    assert not list(tmp_path.glob("dies-*.pt"))
    seen: list[Any] = []
    trainer = plain_trainer(out_dir=tmp_path / "run", save_seconds=0, callbacks=[seen.append])
    trainer.fit()
    assert seen[0].resumed
    assert seen[0].done_steps > 0
    whole = plain_trainer()
    whole.fit()
    # to rounding: two processes add gradients up in another order than one
    one, two = ({"history": t.history.to_dict()} for t in (whole, trainer))
    assert losses(two) == pytest.approx(losses(one), abs=ROUNDING)
    assert trainer.net.metrics == whole.net.metrics


@needs_gloo
@pytest.mark.slow
def test_a_run_that_one_process_began_goes_on_with_more(folder: Path) -> None:
    first, second, whole = outcome(folder, "grown", 0), outcome(folder, "grown", 1), outcome(folder, "plain", 0)
    ((resumed, steps),) = first["resumed"]
    assert resumed
    assert steps > 0
    assert first["digest"] == second["digest"]
    assert losses(first) == pytest.approx(losses(whole), abs=ROUNDING)
    assert_identical(first["masks"], whole["masks"])
    assert first["metrics"] == whole["metrics"]


class Third(Ranks):
    """The last of three, that talks to nobody."""

    rank, world = 2, 3


class First(Third):
    rank = 0


def test_shares_cover_every_example_once() -> None:
    for count in range(12):
        rows = [i for rank in range(5) for i in _of(rank, 5).rows(count)]
        assert rows == list(range(count))


def _of(rank: int, world: int) -> Ranks:
    ranks = Ranks()
    ranks.rank, ranks.world = rank, world
    return ranks


def test_a_batch_is_split_by_its_examples() -> None:
    batch = {"x": torch.arange(7), "pair": (torch.arange(14).reshape(7, 2), torch.tensor(3.0)), "n": 5}
    part = part_of(batch, Third())
    assert (part.rows, part.count, part.total) == (range(4, 7), 3, 7)
    assert part.batch["x"].tolist() == [4, 5, 6]
    assert part.batch["pair"][0].shape == (3, 2)
    assert part.batch["pair"][1] == 3.0
    assert part.batch["n"] == 5
    assert examples(part) == 3
    none = part_of(torch.ones(1, 2), First())  # one example for three: the first has none, but something to run
    assert none.count == 0
    assert none.batch.shape == (1, 2)


@pytest.mark.parametrize("batch", [(torch.ones(2, 3), torch.ones(3)), ["a", "b"], 4], ids=["sizes", "texts", "nothing"])
def test_a_batch_that_cannot_be_split_is_refused(batch: Any) -> None:
    with pytest.raises(TrainingError, match="shard_loader=False"):
        part_of(batch, Third())


@pytest.mark.parametrize("workers", [0, 2])
def test_processes_load_the_same_batches_together_as_one_alone(workers: int) -> None:
    data = torch.utils.data.TensorDataset(torch.arange(20))

    def loader() -> torch.utils.data.DataLoader[Any]:
        generator = torch.Generator().manual_seed(1)
        return torch.utils.data.DataLoader(data, 6, shuffle=True, generator=generator, num_workers=workers)

    whole: list[Tensor] = [batch[0] for batch in loader()]
    parts = [list(shared_loader(loader(), _of(rank, 2))) for rank in (0, 1)]
    together = [torch.cat([part.batch[0][: part.count] for part in row]) for row in zip(*parts, strict=True)]
    assert [b.tolist() for b in together] == [b.tolist() for b in whole]
    assert len(shared_loader(loader(), _of(1, 2))) == 4  # type: ignore[arg-type]


def test_one_process_is_given_its_loaders_as_they_are() -> None:
    loader = [torch.ones(2)]
    assert shared_loader(loader, SINGLE) is loader
    assert held_out_loader(loader, SINGLE) is loader


def test_what_is_no_accelerator_is_refused() -> None:
    with pytest.raises(TrainingError, match="accelerate.Accelerator, got str"):
        plain_trainer(accelerator="ddp")
