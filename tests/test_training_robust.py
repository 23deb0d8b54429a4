"""What happens when the disk, the data, the losses or the process itself fail."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from training_tiny import assert_identical, result, sgd, tiny_loaders, tiny_net, tiny_trainer

from cocktailsdk import CoTrainer, TrainingError
from cocktailsdk.io.atomic import HashingWriter, write_atomic
from cocktailsdk.io.tensors import write_tensors
from cocktailsdk.masks import Mask
from cocktailsdk.training import events as ev
from cocktailsdk.training.state.encoding import decode_masks, encode_masks
from cocktailsdk.training.state.locking import locked
from cocktailsdk.training.state.store import MAGIC, OLD_MAGIC, FolderStore
from cocktailsdk.training.step.nan_guard import LossWatch, StepLocation

FEW: dict[str, Any] = {"rounds": 2, "alphas": (1.0, 0.5)}


class Loss:
    """Cross-entropy that does something at one of its calls."""

    __qualname__ = "cross_entropy"

    def __init__(self, at: int = 0, act: Any = None, until: int | None = None) -> None:
        self.calls, self.at, self.until, self.act = 0, at, at if until is None else until, act

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        self.calls += 1
        loss = F.cross_entropy(output, target)
        return self.act(loss) if self.at <= self.calls <= self.until and self.act is not None else loss


class Crash(BaseException):  # as a kill: an Exception of a callback is saved at
    pass


def crash_at(kind: type[ev.Event], n: int) -> Any:
    left = [n]

    def callback(event: ev.Event) -> None:
        left[0] -= isinstance(event, kind)
        if isinstance(event, kind) and left[0] == 0:
            raise Crash

    return callback


def few(out_dir: Path | None = None, seed: int = 0, **options: Any) -> CoTrainer:
    return tiny_trainer(tiny_net(seed), out_dir, **{**FEW, **options})


@pytest.fixture(scope="module")
def whole() -> dict[str, Any]:
    trainer = few()
    trainer.fit()
    return result(trainer)


def no_number(loss: Tensor) -> Tensor:
    return loss * float("nan")


def states(folder: Path) -> list[Path]:
    return sorted((folder / "state").glob("state-*.pt"))


def content(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        file.readline()
        state: dict[str, Any] = torch.load(file, weights_only=True)
    return state


# --- files


def test_tensors_of_every_kind_are_written_as_safetensors_reads_them(tmp_path: Path) -> None:
    tensors = {
        "matrix": torch.randn(3, 5).T,
        "nothing": torch.zeros(0, 4),
        "number": torch.tensor(7),
        "half": torch.randn(5).to(torch.bfloat16),
        "eighth": torch.randn(5).to(torch.float8_e4m3fn),
        "mask": torch.rand(4, 3) > 0.5,
        "complex": torch.randn(3, dtype=torch.complex64),
        "ünïcode/naïve": torch.arange(3, dtype=torch.int8),
    }
    written = write_tensors(tmp_path / "a.safetensors", tensors)
    read = load_file(written.path)
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype and read[name].shape == tensor.shape
        assert (
            read[name].contiguous().view(torch.uint8).tolist() == tensor.contiguous().view(torch.uint8).tolist()
            if (tensor.ndim and tensor.dtype != torch.complex64)
            else torch.equal(read[name], tensor)
        )
    with pytest.raises(TrainingError, match="b has the dtype torch.complex128"):
        write_tensors(tmp_path / "b.safetensors", {"b": torch.zeros(2, dtype=torch.complex128)})


def test_a_writer_in_cpp_survives_any_failure_and_nothing_is_left(tmp_path: Path) -> None:
    class Broken:
        def write(self, data: Any) -> int:
            raise KeyboardInterrupt

    sink = HashingWriter(Broken())  # type: ignore[arg-type]
    torch.save({"a": torch.zeros(10_000)}, sink)  # type: ignore[arg-type]
    assert isinstance(sink.error, KeyboardInterrupt)
    assert sink.bytes > 40_000
    path = tmp_path / "file"
    path.write_bytes(b"before")

    def fill(sink: HashingWriter) -> None:
        sink.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomic(path, fill)
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"before"]


def test_masks_that_mask_nothing_are_kept() -> None:
    net = tiny_net()
    masks = {
        "unstructured@0.3": Mask(),
        "unstructured@0.5": Mask({"conv2.weight": torch.ones(8, 8, 3, 3, dtype=torch.bool)}),
        "1:2": net.masks["1:2"],
    }
    again = decode_masks(encode_masks(net, masks), net)
    assert list(again) == list(masks)
    assert again["unstructured@0.3"] == Mask()


# --- states


def test_a_file_that_only_the_newest_state_needs_is_lost_and_the_one_before_goes_on(
    tmp_path: Path, whole: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(Crash):
        few(tmp_path, callbacks=[crash_at(ev.RoundEnded, 2)]).fit()
    (round_file,) = (tmp_path / "state").glob("round-01-*.safetensors")
    assert "round-01" in content(states(tmp_path)[-1])["files"]
    assert "round-01" not in content(states(tmp_path)[-2])["files"]
    round_file.unlink()
    (tmp_path / "state" / ".state-000009.pt.77.tmp").write_bytes(b"half")
    again = few(tmp_path, seed=9)
    with caplog.at_level(logging.WARNING):
        again.fit()
    assert "round-01" in caplog.text and "is missing" in caplog.text and "the state before it" in caplog.text
    assert_identical(result(again), whole)
    assert not list((tmp_path / "state").glob(".*"))


def test_both_states_find_the_files_that_they_name_at_any_time(tmp_path: Path) -> None:
    def look(event: ev.Event) -> None:
        if isinstance(event, ev.Saved):
            for path in states(tmp_path):
                for entry in content(path)["files"].values():
                    assert (tmp_path / "state" / entry["file"]).stat().st_size == entry["bytes"]

    few(tmp_path, save_seconds=0, callbacks=[look]).fit()
    named = {entry["file"] for path in states(tmp_path) for entry in content(path)["files"].values()}
    assert {p.name for p in (tmp_path / "state").glob("*.safetensors")} == named


def test_states_of_the_first_release_are_gone_on_with(tmp_path: Path, whole: dict[str, Any]) -> None:
    with pytest.raises(KeyboardInterrupt):
        few(tmp_path, callbacks=[lambda e: _interrupt(e, ev.RoundStarted, 2)]).fit()
    import hashlib
    import io

    state = content(states(tmp_path)[-1])
    for name, entry in state["files"].items():
        (tmp_path / "state" / entry["file"]).rename(tmp_path / "state" / f"{name}.safetensors")
    state["files"] = {name: entry["sha256"] for name, entry in state["files"].items()}
    del state["skipped_in_a_row"], state["history"]["skipped"]
    buffer = io.BytesIO()
    torch.save(state, buffer)
    for path in states(tmp_path):
        path.unlink()
    head = OLD_MAGIC + hashlib.sha256(buffer.getvalue()).hexdigest().encode() + b"\n"
    (tmp_path / "state" / "state-000004.pt").write_bytes(head + buffer.getvalue())
    assert MAGIC != OLD_MAGIC
    again = few(tmp_path, seed=9)
    again.fit()
    assert_identical(result(again), whole)


def _interrupt(event: ev.Event, kind: type[ev.Event], round_: int) -> None:
    if isinstance(event, kind) and getattr(event, "round", None) == round_:
        raise KeyboardInterrupt


@pytest.mark.parametrize(("kind", "n"), [(ev.StepDone, 16), (ev.MergeProgress, 9), (ev.NetworkFinished, 4)])
def test_a_crash_in_the_middle_of_anything_loses_no_more_than_save_minutes(
    kind: type[ev.Event], n: int, tmp_path: Path, whole: dict[str, Any]
) -> None:
    with pytest.raises(Crash):
        few(tmp_path, save_minutes=0, callbacks=[crash_at(kind, n)]).fit()
    seen: list[ev.Event] = []
    again = few(tmp_path, seed=9, callbacks=[seen.append])
    again.fit()
    assert_identical(result(again), whole)
    first = next(e for e in seen if isinstance(e, kind))
    match first:
        case ev.StepDone():
            assert first.done_steps == n
        case ev.MergeProgress():
            assert first.judged > 1  # what was judged is not judged again
        case ev.NetworkFinished():
            assert first.done == n


def test_numpy_numbers_of_a_schedule_are_saved_and_what_needs_code_is_refused(tmp_path: Path) -> None:
    import numpy as np

    class Odd(torch.optim.lr_scheduler.LambdaLR):
        def __init__(self, optimizer: Any, extra: Any) -> None:
            self.extra = extra
            super().__init__(optimizer, lambda step: 1.0)

    with pytest.raises(Crash):
        few(tmp_path / "a", schedule=lambda o, n: Odd(o, np.float64(0.5)), callbacks=[crash_at(ev.RoundEnded, 1)]).fit()
    few(tmp_path / "a", schedule=lambda o, n: Odd(o, np.float64(0.5)), callbacks=[]).fit()
    with pytest.raises(TrainingError, match=r"cannot be read again without running code.*state_dict\(\)"):
        few(tmp_path / "b", schedule=lambda o, n: Odd(o, Path("x"))).fit()
    assert not states(tmp_path / "b")


def test_one_run_at_a_time_trains_in_a_folder(tmp_path: Path) -> None:
    def second(event: ev.Event) -> None:
        if isinstance(event, ev.RoundStarted):
            with pytest.raises(TrainingError, match="another run is training in"):
                few(tmp_path).fit()
            raise Crash

    with pytest.raises(Crash):
        few(tmp_path, callbacks=[second]).fit()
    with pytest.raises(Crash):  # released
        few(tmp_path, callbacks=[crash_at(ev.RoundStarted, 1)]).fit()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that can be forked")
def test_other_processes_are_kept_out_and_forked_ones_end_as_they_should(tmp_path: Path) -> None:
    program = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from cocktailsdk import TrainingError\n"
        "from cocktailsdk.training.interrupt import Interrupts\n"
        "from cocktailsdk.training.state.locking import locked\n"
        "path = Path(sys.argv[1])\n"
        "def status(act):\n"
        "    pid = os.fork()\n"
        "    if pid == 0:\n"
        "        try:\n"
        "            act()\n"
        "        except TrainingError:\n"
        "            os._exit(3)\n"
        "        os._exit(4)\n"
        "    return os.waitpid(pid, 0)[1]\n"
        "def again():\n"
        "    with locked(path):\n"
        "        pass\n"
        "with locked(path), Interrupts() as interrupts:\n"
        "    assert os.waitstatus_to_exitcode(status(again)) == 3\n"
        "    ended = status(lambda: os.kill(os.getpid(), signal.SIGTERM))\n"
        "    assert os.waitstatus_to_exitcode(ended) == -signal.SIGTERM, ended\n"
        "    assert not interrupts.requested\n"
        "assert os.waitstatus_to_exitcode(status(again)) == 4\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, str(tmp_path / "lock")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that can be forked")
def test_a_killed_run_leaves_no_lock_though_a_worker_that_it_forked_lives_on(tmp_path: Path) -> None:
    program = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from cocktailsdk.training.state.locking import locked\n"
        "with locked(Path(sys.argv[1])):\n"
        "    if os.fork() == 0:\n"
        "        sys.stdin.read()\n"  # until the test ends
        "        os._exit(0)\n"
        "    print('ready', flush=True)\n"
        "    signal.pause()\n"
    )
    path = tmp_path / "lock"
    command = [sys.executable, "-W", "ignore", "-c", program, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        with pytest.raises(TrainingError, match="another run is training in"), locked(path):
            pass
        process.kill()
        os.waitpid(process.pid, 0)
        process.returncode = -9
        with locked(path):
            pass
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask()


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


# --- disks


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """No file may grow beyond so many bytes: writing fails as on a disk that is full."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_fails_is_named_and_the_last_good_state_stands(tmp_path: Path, whole: dict[str, Any]) -> None:
    with pytest.raises(Crash):
        few(tmp_path, callbacks=[crash_at(ev.RoundEnded, 2)]).fit()
    before = {p: p.read_bytes() for p in (tmp_path / "state").iterdir()}
    good = states(tmp_path)[-1]
    with files_up_to(min(p.stat().st_size for p in states(tmp_path)) // 2), pytest.raises(TrainingError) as caught:
        few(tmp_path).fit()
    said = str(caught.value)
    assert "cannot be written (File too large): it takes " in said and "are free there" in said
    assert "Nothing half-written is left" in said
    assert f"The last good state, {good}, stands" in said
    assert isinstance(caught.value.__cause__, OSError)
    left = {p: p.read_bytes() for p in (tmp_path / "state").iterdir()}
    assert {p: left[p] for p in before} == before
    assert not list((tmp_path / "state").glob(".*"))
    again = few(tmp_path, seed=9)
    again.fit()
    assert_identical(result(again), whole)


def test_a_disk_that_is_full_is_named(tmp_path: Path, whole: dict[str, Any]) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(disk)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("needs the right to mount a small file system")
    try:
        with pytest.raises(TrainingError, match=r"No space left on device\): it takes [\d,]+ bytes, and [\d,]+ are"):
            few(disk / "run").fit()
        assert not list((disk / "run" / "state").glob(".*"))
        assert subprocess.run(["mount", "-o", "remount,size=20m", str(disk)], check=False).returncode == 0
        again = few(disk / "run", seed=9)
        again.fit()
        assert_identical(result(again), whole)
    finally:
        # lazily: what was read may still be mapped, and a mount left behind keeps pytest from tidying its folders
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


# --- losses


def test_the_first_bad_step_is_found_though_losses_are_looked_at_later() -> None:
    watch = LossWatch(torch.device("cpu"), limit=100)
    for i in range(40):
        bad = 17 <= i <= 20
        losses = {"dense": torch.tensor(float(i)), "2:4": torch.tensor(float("inf") if bad else 0.5)}
        assert watch.add(StepLocation(3, 1, i, i // 2, 100 + i), losses) is None
    assert watch.look() == (
        "the training loss of 2:4 became inf in round 3, epoch 1, step 17, on batch 8 of the loader "
        "(all from 0; step 117 of the run)"
    )
    assert watch.look() is None
    watch = LossWatch(torch.device("cpu"))
    assert watch.add(StepLocation(0, 0, 0, 0, 0), {"dense": torch.tensor(float("nan"))}) is not None


def test_a_loss_that_is_no_number_stops_the_run_and_is_never_saved(tmp_path: Path) -> None:
    loss = Loss(20, no_number)  # a call for the first look; round 1 has the distillation on every second step
    with pytest.raises(TrainingError) as caught:
        few(tmp_path, loss_fn=loss, save_minutes=0).fit()
    said = str(caught.value)
    assert "became nan in round 1, epoch 1, step 0, on batch 0 of the loader (all from 0; step 18 of the run)" in said
    assert f"The last good state, {states(tmp_path)[-1]}, stands" in said
    assert 'on_nan="skip"' in said
    for path in states(tmp_path):
        state = content(path)
        assert state["position"]["round"] == 1 and state["position"]["epoch"] in (0, 1)
        assert all(t.isfinite().all() for t in state["model"].values())


def test_steps_without_a_finite_loss_are_left_out_and_change_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made: list[torch.optim.Optimizer] = []
    seen: list[ev.Event] = []
    kept: dict[str, Any] = {}

    def optimizer(parameters: Any) -> torch.optim.Optimizer:
        made.append(sgd(parameters))
        return made[-1]

    def watch(event: ev.Event) -> None:
        seen.append(event)
        now = {name: tensor.clone() for name, tensor in trainer.net.model.state_dict().items()}
        now |= {f"momentum{i}": s["momentum_buffer"].clone() for i, s in enumerate(made[-1].state.values())}
        if isinstance(event, ev.StepSkipped):
            assert_identical(now, kept)
        kept.clear()
        kept.update(now)

    trainer = few(tmp_path, loss_fn=Loss(20, no_number, 21), on_nan="skip", optimizer=optimizer, callbacks=[watch])
    with caplog.at_level(logging.WARNING):
        trainer.fit()
    skipped = [e for e in seen if isinstance(e, ev.StepSkipped)]
    assert [(e.round, e.epoch, e.step, e.batch, e.network) for e in skipped] == [
        (1, 1, 0, 0, "dense"),
        (1, 1, 1, 1, skipped[1].network),
    ]
    assert trainer.history.skipped == 2
    assert trainer.history.steps == trainer._options.all_steps - 2
    assert "left out a step in round 1, epoch 1, step 0" in caplog.text
    losses = [loss for r in trainer.history.rounds for epoch in r.losses for loss in epoch.values()]
    assert all(torch.tensor(losses).isfinite())


def test_a_run_that_stopped_at_a_loss_goes_on_without_it(tmp_path: Path) -> None:
    class Bad:
        """Three batches of the fourth epoch hold what is no number."""

        def __init__(self) -> None:
            self.inner, self.passes = tiny_loaders()[0], 0

        def __len__(self) -> int:
            return len(self.inner)

        def __iter__(self) -> Iterator[Any]:
            for x, y in self.inner:
                # which examples they hold, not how often one was asked, decides
                yield (x * float("nan"), y) if bad(x) else (x, y)

    def bad(x: Tensor) -> bool:
        return 0.09 < float(x.sum()) % 1 < 0.13

    expected = few(train_loader=Bad(), on_nan="skip")
    expected.fit()
    assert 0 < expected.history.skipped < 10
    with pytest.raises(TrainingError, match="became nan"):
        few(tmp_path, train_loader=Bad()).fit()
    with pytest.raises(Crash):
        few(tmp_path, train_loader=Bad(), on_nan="skip", callbacks=[crash_at(ev.StepSkipped, 1)]).fit()
    again = few(tmp_path, train_loader=Bad(), on_nan="skip")
    again.fit()
    assert_identical(result(again), result(expected))


def test_too_many_in_a_row_stop_the_run_all_the_same(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"25 steps in a row were left out.*The last good state, .*, stands"):
        few(tmp_path, loss_fn=Loss(8, no_number, 99), on_nan="skip").fit()
    with pytest.raises(TrainingError, match='on_nan must be "raise" or "skip", got \'no\''):
        few(on_nan="no")
    with pytest.raises(TrainingError, match="save_minutes must be at least 0, got -1"):
        few(save_minutes=-1)


def test_weights_that_explode_under_a_finite_loss_are_never_saved(tmp_path: Path) -> None:
    class Exploding(torch.optim.SGD):
        steps = 0

        def step(self, closure: Any = None) -> Any:
            type(self).steps += 1
            super().step(closure)
            if self.steps == 18:  # the last of an epoch
                self.param_groups[0]["params"][3].detach().fill_(float("inf"))

    with pytest.raises(TrainingError, match=r"conv2\.weight|bn2|bn1") as caught:
        few(tmp_path, optimizer=lambda p: Exploding(p, lr=0.1)).fit()
    assert "though the losses were finite" in str(caught.value)
    for path in states(tmp_path):
        assert all(t.isfinite().all() for t in content(path)["model"].values())


# --- loaders, signals, callbacks


class Failing:
    """A loader whose n-th batch of all cannot be loaded."""

    def __init__(self, inner: Any, n: int) -> None:
        self.inner, self.left = inner, n

    def __len__(self) -> int:
        return len(self.inner)

    def __iter__(self) -> Iterator[Any]:
        for batch in self.inner:
            self.left -= 1
            if self.left == 0:
                raise OSError("the share with the images is gone")
            yield batch


def test_a_loader_that_raises_is_named_and_the_run_saved_first(tmp_path: Path, whole: dict[str, Any]) -> None:
    train, held_out = tiny_loaders()
    broken = Failing(
        train, 1 + 2 + 12 + 6 + 4
    )  # first look, recalibration, round 0, an epoch of round 1, and three more
    seen: list[ev.Event] = []
    with pytest.raises(TrainingError) as caught:
        few(tmp_path, train_loader=broken, callbacks=[seen.append]).fit()
    assert (
        "train_loader, in round 1, epoch 1, raised OSError (the share with the images is gone) for batch 3, from 0. "
        f"The run was saved in {states(tmp_path)[-1]}" in str(caught.value)
    )
    assert isinstance(caught.value.__cause__, OSError)
    assert content(states(tmp_path)[-1])["position"]["step"] == 3
    assert isinstance(seen[-1], ev.Saved)
    with pytest.raises(TrainingError, match=r"the loader raised OSError .* for its first batch"):
        few(train_loader=Failing(train, 1)).fit()
    with pytest.raises(TrainingError, match=r"val_loader raised OSError .* for batch 1, from 0\. The run was saved in"):
        few(tmp_path, val_loader=Failing(held_out, 2)).fit()
    again = few(tmp_path, seed=9)
    again.fit()
    assert_identical(result(again), whole)


def test_sigterm_saves_and_ends_with_its_status(tmp_path: Path, whole: dict[str, Any]) -> None:
    def terminate(loss: Tensor) -> Tensor:
        os.kill(os.getpid(), signal.SIGTERM)
        return loss

    before = signal.getsignal(signal.SIGTERM)
    seen: list[ev.Event] = []
    with pytest.raises(SystemExit) as caught:
        few(tmp_path, loss_fn=Loss(30, terminate), event_seconds=3600, callbacks=[seen.append]).fit()
    assert caught.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is before
    assert isinstance(seen[-1], ev.Saved) and seen[-1].interrupted
    again = few(tmp_path, seed=9)
    again.fit()
    assert_identical(result(again), whole)


def test_a_signal_while_networks_are_measured_does_not_wait_for_the_rest(tmp_path: Path, whole: dict[str, Any]) -> None:
    seen: list[ev.Event] = []
    calls = [0]

    def metric(output: Tensor, target: Tensor) -> Tensor:
        calls[0] += 1
        if stop_at == calls[0]:
            os.kill(os.getpid(), signal.SIGINT)
        return output.argmax(1) == target

    metric.__qualname__ = "accuracy"
    whole_run = few(metric=metric)
    stop_at = 0
    whole_run.fit()
    for stop_at in (1, 5, 20):  # in round 0, in round 1, in merging
        calls[0] = 0
        with pytest.raises(KeyboardInterrupt):
            few(tmp_path, metric=metric, event_seconds=3600, callbacks=[seen.append]).fit()
        assert calls[0] == stop_at
        assert isinstance(seen[-1], ev.Saved) and seen[-1].interrupted
    stop_at = 0
    again = few(tmp_path, metric=metric, seed=9)
    again.fit()
    assert_identical(result(again), result(whole_run))


def test_a_second_signal_stops_at_once(tmp_path: Path) -> None:
    def twice(loss: Tensor) -> Tensor:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        return loss

    loss = Loss(30, twice)
    seen: list[ev.Event] = []
    with pytest.raises(SystemExit):
        few(tmp_path, loss_fn=loss, callbacks=[seen.append]).fit()
    assert loss.calls == 30
    assert not any(isinstance(e, ev.Saved) and e.interrupted for e in seen)
    assert not list((tmp_path / "state").glob(".*"))


def test_a_callback_must_leave_the_dense_network_active() -> None:
    def leave(event: ev.Event) -> None:
        if isinstance(event, ev.RoundStarted) and event.round == 1:
            trainer.net.switch("1:2")

    trainer = few(callbacks=[leave])
    with pytest.raises(TrainingError, match="a callback left '1:2' active after RoundStarted"):
        trainer.fit()


def test_saving_never_copies_the_model(tmp_path: Path) -> None:
    import tracemalloc

    store = FolderStore(tmp_path, {"a": 1})
    big = torch.zeros(4_000_000)
    store.put("rewind", {"a": big})
    store.save(lambda: {"model": {"a": big}}, lambda name: True)  # read back once
    tracemalloc.start()
    store.save(lambda: {"model": {"a": big}}, lambda name: True)
    store.put("round-01", {"a": big})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < big.nbytes / 4


def test_a_folder_in_the_place_of_the_lock_is_refused(tmp_path: Path) -> None:
    (tmp_path / "lock").mkdir()
    with pytest.raises(TrainingError, match="is not a file, so no run can be locked"), locked(tmp_path / "lock"):
        pass
