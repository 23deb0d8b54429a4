"""The one-shot comparison: plain versions prune as their papers say, runs are kept and found, tables say what is so."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def tiny_llama(seed: int = 0) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = transformers.LlamaForCausalLM(config)
    return model.eval()


def tokens(rows: int, seed: int) -> Tensor:
    return torch.randint(0, 64, (rows, 12), generator=torch.Generator().manual_seed(seed))


def batches() -> list[dict[str, Tensor]]:
    return [{"input_ids": ids, "labels": ids} for ids in tokens(8, 1).split(4)]


@pytest.fixture
def task() -> Any:
    from one_shot_tasks import Place, Size, Task, perplexity

    class Tiny(Task):
        name = "tiny"
        title = "a tiny Llama"
        metric = "perplexity"
        lower_is_better = True
        sizes = (Size(8, 12),)

        def model(self, place: Place) -> nn.Module:
            return tiny_llama()

        def calibration(self, place: Place, size: Size) -> list[Any]:
            return batches()

        def measure(self, model: nn.Module, place: Place) -> float:
            return perplexity(model, [tokens(4, 2)])

    return Tiny()


def row(method: str, values: dict[str, float], size: str = "32x256", **others: Any) -> dict[str, Any]:
    made = {"task": "smollm2", "method": method, "size": size, "values": values, "cpu_seconds": 60.0}
    return {**made, "reconstructed": False, "key": f"{method} {' '.join(values)} {size}", **others}


def inputs(count: int = 200, width: int = 32) -> Tensor:
    """Correlated, as those of trained networks are."""
    generator = torch.Generator().manual_seed(3)
    return torch.randn(count, 8, generator=generator) @ torch.randn(8, width, generator=generator) + torch.randn(
        count, width, generator=generator
    )


@pytest.mark.parametrize(("share", "m"), [(0.5, 0), (0.25, 0), (0.5, 4)])
def test_wanda_zeroes_the_smallest_products_of_weight_and_input_norm(share: float, m: int) -> None:
    from one_shot_reference import Sparsity, wanda

    x, weight = inputs(), torch.randn(16, 32, generator=torch.Generator().manual_seed(4))
    pruned = wanda(weight, x.T @ x, Sparsity(share, m))
    score = weight.abs() * x.norm(dim=0)
    groups, zeros = (t.reshape(16, -1, m or 32) for t in (score, pruned == 0))
    assert (zeros.sum(2) == round(share * (m or 32))).all() and torch.equal(pruned[pruned != 0], weight[pruned != 0])
    largest = groups.masked_fill(~zeros, -1).amax(2)
    assert (largest <= groups.masked_fill(zeros, float("inf")).amin(2)).all()


def test_sparsegpt_without_correlations_is_magnitude_pruning() -> None:
    from one_shot_reference import Sparsity, smallest, sparsegpt

    weight = torch.randn(16, 32, generator=torch.Generator().manual_seed(4))
    pruned = sparsegpt(weight, 5 * torch.eye(32), Sparsity(0.5, 4))
    torch.testing.assert_close(pruned, weight.masked_fill(smallest(weight.abs(), Sparsity(0.5, 4)), 0))


@pytest.mark.parametrize("m", [0, 4])
def test_sparsegpt_loses_less_of_a_layers_output_than_wanda(m: int) -> None:
    from one_shot_reference import Sparsity, sparsegpt, wanda

    x, weight = inputs(width=256), torch.randn(16, 256, generator=torch.Generator().manual_seed(4))
    losses = []
    for prune in (wanda, sparsegpt):
        pruned = prune(weight, x.T @ x, Sparsity(0.5, m))
        assert abs(int((pruned == 0).sum()) - pruned.numel() // 2) <= 2  # SparseGPT's threshold is one too many a block
        losses.append(float(((weight - pruned) @ x.T).norm()))
    assert losses[1] < 0.8 * losses[0]


def test_a_block_is_pruned_by_the_inputs_that_the_pruned_blocks_before_it_give() -> None:
    from one_shot_reference import Sparsity, blocks_of, linears_of, observed, prune_linears, wanda

    model, seen = tiny_llama(), []

    def recording(weight: Tensor, gram: Tensor, sparsity: Sparsity) -> Tensor:
        seen.append(gram)
        return wanda(weight, gram, sparsity)

    prune_linears(model, batches(), recording, Sparsity(0.5))
    found: list[Tensor] = []
    second = {"q": linears_of(blocks_of(model)[1])["self_attn.q_proj"]}
    with torch.no_grad(), observed(second, lambda name, x: found.append(x.T @ x)):
        for batch in batches():
            model(**batch)
    assert len(seen) == 21  # seven linear layers in each of three blocks
    torch.testing.assert_close(seen[7], found[0] + found[1])


def test_by_cosine_a_block_that_does_nothing_is_dropped_first(task: Any) -> None:
    from one_shot_reference import blocks_of, drop_blocks_by_cosine

    model = tiny_llama()
    with torch.no_grad():
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            blocks_of(model)[1].get_parameter(f"{name}.weight").zero_()
    before = task.measure(model, None)
    assert drop_blocks_by_cosine(model, batches(), 1) == [1] and len(blocks_of(model)) == 2
    assert task.measure(model, None) == pytest.approx(before)


def test_dropping_by_loss_takes_the_block_without_which_the_loss_is_least() -> None:
    from one_shot_reference import drop_blocks, drop_blocks_by_loss
    from one_shot_tasks import perplexity

    rows = [batch["input_ids"] for batch in batches()]
    without = []
    for i in range(3):
        model = tiny_llama(1)
        drop_blocks(model, [i])
        without.append(perplexity(model, rows))
    assert drop_blocks_by_loss(tiny_llama(1), batches(), 1) == [without.index(min(without))]


def test_narrowing_removes_the_same_share_of_every_mlp() -> None:
    from one_shot_reference import blocks_of, narrow_mlps

    model = tiny_llama()
    narrow_mlps(model, batches(), 0.25)
    downs = [block.get_parameter("mlp.down_proj.weight") for block in blocks_of(model)]
    assert [int((w == 0).all(0).sum()) for w in downs] == [16, 16, 16]


def test_runs_are_kept_and_made_once(task: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from one_shot import listed, missing, run_piece
    from one_shot_pieces import Piece
    from one_shot_runs import Dense, Reference
    from one_shot_tasks import Place

    size, results = task.sizes[0], tmp_path / "one_shot.json"
    subnets = {"wanda": "2:4", "sparsegpt": "unstructured@0.5", "activation": "mlp@0.25", "loss": "layers@0.333"}
    runs = (Dense(), *(Reference(of=of, subnets=(subnet,), size=size) for of, subnet in subnets.items()))
    piece, place = Piece(task, "all", runs), Place(tmp_path, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        run_piece("tiny:all", piece, place, results, deadline=0.0)
    run_piece("tiny:all", piece, place, results, deadline=float("inf"))
    rows = json.loads(results.read_text())["rows"]
    assert len(rows) == 5 and not missing(piece, results)
    found = {r["method"]: r for r in rows}
    assert found["reference wanda"]["values"]["2:4"] != found["dense"]["values"]["dense"]
    assert found["reference sparsegpt"]["reconstructed"] and len(found["reference loss"]["settings"]["dropped"]) == 1
    assert all(r["cpu_seconds"] >= 0 and r["torch"] == torch.__version__ for r in rows)
    assert listed({"tiny:all": piece}, results).endswith("5 of 5")
    capsys.readouterr()
    run_piece("tiny:all", piece, place, results, deadline=float("inf"))
    assert not capsys.readouterr().out


def test_every_run_has_a_key_of_its_own_within_its_task() -> None:
    from one_shot_pieces import pieces

    every = [(piece.task.name, run.key) for piece in pieces().values() for run in piece.runs]
    assert len(every) > 100 and len(every) == len(set(every))


def test_a_piece_without_its_package_or_folder_is_skipped_with_what_to_type(
    task: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from one_shot import run_piece
    from one_shot_pieces import Piece
    from one_shot_runs import Dense
    from one_shot_tasks import Place

    piece, place = Piece(task, "all", (Dense(),)), Place(tmp_path, tmp_path)
    task.folders = ("texts",)
    run_piece("tiny:all", piece, place, tmp_path / "rows.json", float("inf"))
    task.needs = ("no_such_package",)
    run_piece("tiny:all", piece, place, tmp_path / "rows.json", float("inf"))
    first, second = capsys.readouterr().out.splitlines()
    assert first == f"tiny:all: skipped: {tmp_path} does not hold texts: give --data FOLDER"
    assert second.endswith("no_such_package not installed: pip install --no-deps no-such-package")
    assert not (tmp_path / "rows.json").exists()


def test_targets_are_compared_with_the_best_of_ours_and_with_the_plain_version() -> None:
    from one_shot_rows import target_table

    rows = [
        row("reference wanda", {"2:4": 141.4}),
        row("magnitude", {"2:4": 1219.0}),
        row("wanda", {"2:4": 139.0}),
        row("wanda, reconstructed", {"2:4": 78.5}, reconstructed=True),
        row("reference sparsegpt", {"2:4": 76.0}, reconstructed=True),
        row("wanda", {"2:4": 120.0}, size="64x512"),
        row("wanda", {f"a@{i}": 1.0 for i in range(12)}, cpu_seconds=630.0),
    ]
    lines = target_table(rows).splitlines()[2:]
    assert lines == [
        "| 2:4 | 32x256 | 140.0 | 139.0 | wanda | 141.4 (wanda) | yes |",
        "| 2:4, reconstructed | 32x256 | 79.0 | 78.5 | wanda, reconstructed | 76.0 (sparsegpt) | no |",  # by 3 %
        "| 2:4 | 64x512 |  | 120.0 | wanda |  | yes |",
        "| 12 subnetworks scored, CPU minutes | 32x256 | 10 | 10.5 | wanda |  | no |",
    ]


def test_tables_name_what_reconstruction_made_worse() -> None:
    from one_shot_rows import tables, worse_when_reconstructed

    rows = [
        row("wanda", {"2:4": 140.0, "mlp@0.1": 45.0}),
        row("wanda, reconstructed", {"2:4": 75.0}, reconstructed=True),
        row("wanda, reconstructed", {"mlp@0.1": 48.6}, reconstructed=True),
        row("wanda", {"2:4": 80.0}, task="minilm", size="512x32"),
        row("wanda, reconstructed", {"2:4": 79.0}, task="minilm", size="512x32", reconstructed=True),  # less is worse
    ]
    assert worse_when_reconstructed(rows) == [
        "smollm2 mlp@0.1 by wanda, reconstructed: 45.0 before, 48.6 after",
        "minilm 2:4 by wanda, reconstructed: 80.0 before, 79.0 after",
    ]
    shown = tables(rows)
    assert "| wanda, reconstructed | 32x256 | 75.0 | 48.6 | 120 |" in shown and "all-MiniLM-L6-v2" in shown


def test_without_data_the_benchmark_says_so_and_is_no_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import one_shot

    monkeypatch.delenv("COCKTAIL_DATA", raising=False)
    monkeypatch.setattr(sys, "argv", ["one_shot.py"])
    assert one_shot.main() == 0
    assert capsys.readouterr().out.startswith("skipped: texts and images are needed")


@pytest.mark.parametrize("subnet", ["unstructured@0.5", "2:4"])
def test_ours_block_by_block_prunes_what_plain_wanda_prunes(subnet: str, task: Any, tmp_path: Path) -> None:
    from one_shot_runs import Ours, Reference
    from one_shot_tasks import Place

    place, size = Place(tmp_path, tmp_path), task.sizes[0]
    ours = Ours(subnets=(subnet,), score="wanda", size=size, sequential=True).row(task, place)
    plain = Reference(of="wanda", subnets=(subnet,), size=size).row(task, place)
    assert ours["values"][subnet] == pytest.approx(plain["values"][subnet], rel=1e-5)
    assert ours["settings"]["sparsity"] == {subnet: 0.5} and ours["method"] == "wanda, block by block"


def test_a_reconstructed_network_is_measured_as_the_plain_model_that_it_is(task: Any, tmp_path: Path) -> None:
    from one_shot_runs import Ours
    from one_shot_tasks import Place

    place, subnets = Place(tmp_path, tmp_path), ("2:4", "mlp@0.25")
    run = Ours(subnets=subnets, score=(("*", "wanda"), ("mlp", "activation")), size=task.sizes[0], repaired=True)
    row = run.row(task, place)
    assert row["reconstructed"] and row["method"] == "*=wanda mlp=activation, reconstructed"
    assert set(row["values"]) == set(subnets) and row["cpu_seconds"] > 0
