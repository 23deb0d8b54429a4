"""Scores from data: what calibration observes, what scores make of it, and what patterns rank by it."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import cocktailsdk as cocktail
from cocktailsdk.calibration import CalibrationData
from cocktailsdk.calibration.passes import gram_groups, observe_gradients, observe_inputs
from cocktailsdk.patterns.comparison import apportion
from cocktailsdk.patterns.scores import Observed, Score, Wanda, register_score
from cocktailsdk.patterns.scores.matrices import as_matrices, from_matrices

EXAMPLE = (torch.zeros(2, 12),)


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 5))


def batches(n: int = 3, *shape: int, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(4, *(shape or (12,)), generator=generator) for _ in range(n)]


def observed(net: cocktail.CocktailNet, data: list, **options: object) -> dict[str, Observed | None]:
    weights = net.coupling.weights
    found = observe_inputs(net.model, weights, CalibrationData.of(data), **options)  # type: ignore[arg-type]
    return {weight.name: seen for weight, seen in found}


class Shapes(nn.Module):
    """Every kind of weight: plain, strided, dilated, grouped, depthwise and transposed convolutions, 1-D and 3-D."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Conv2d(3, 8, 3, padding=1)
        self.strided = nn.Conv2d(8, 8, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2), groups=2)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2, groups=2)
        self.line = nn.Conv1d(6, 8, 3)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.depthwise(F.relu(self.strided(F.relu(self.plain(x))))))
        x = F.relu(self.up(x)).flatten(2)
        return self.head(F.relu(self.line(x)).mean(2))


@pytest.mark.parametrize("gram", [False, True])
def test_what_is_observed_of_a_weight_reproduces_the_norm_of_its_outputs(gram: bool) -> None:
    torch.manual_seed(0)
    model = Shapes().double()
    example = torch.randn(2, 3, 9, 8, dtype=torch.float64)
    net = cocktail.sparsify(model, ["unstructured@0.5"], example)
    seen = observed(net, [example], gram=gram)
    for path in ("plain", "strided", "depthwise", "line", "head"):
        weight = next(w for w in net.coupling.weights if w.module == path)
        module = model.get_submodule(path)
        outputs: list[Tensor] = []
        with torch.no_grad():
            module.bias.zero_()  # type: ignore[union-attr,operator]
            handle = module.register_forward_hook(lambda *args, out=outputs: out.append(args[-1]))
            model(example)
            handle.remove()
            again = observed(net, [example], gram=gram)[weight.name]
        assert again is not None
        matrix = as_matrices(weight, model.get_parameter(weight.name).detach())
        if gram:
            assert again.gram is not None
            energy = torch.einsum("pof,pfg,pog->po", matrix, again.gram, matrix).flatten()
            want = (
                outputs[0].movedim(1, -1).flatten(0, -2).square().sum(0)
                if path != "head"
                else outputs[0].square().sum(0)
            )
            torch.testing.assert_close(energy, want)
        assert again.squares is not None and again.squares.shape == (matrix.shape[0], matrix.shape[2])
    assert seen["up.weight"] is not None and seen["up.weight"].squares is not None
    assert seen["up.weight"].squares.shape == (2, 4)


def test_squares_are_the_diagonal_of_the_products_of_inputs() -> None:
    net = cocktail.sparsify(Shapes(), ["unstructured@0.5"], torch.zeros(2, 3, 9, 8))
    data = batches(2, 3, 9, 8)
    squares, grams = observed(net, data), observed(net, data, gram=True)
    for name, seen in squares.items():
        products = grams[name]
        assert seen is not None and products is not None and seen.squares is not None and products.gram is not None
        assert seen.rows == products.rows
        torch.testing.assert_close(seen.squares, products.gram.diagonal(dim1=1, dim2=2), rtol=1e-4, atol=1e-4)


def test_matrices_of_a_weight_go_back_to_the_weight() -> None:
    net = cocktail.sparsify(Shapes(), ["unstructured@0.5"], torch.zeros(2, 3, 9, 8))
    for weight in net.coupling.weights:
        value = torch.randn(weight.shape)
        assert torch.equal(from_matrices(weight, as_matrices(weight, value)), value)


def test_wanda_is_magnitude_times_the_norm_of_the_input_within_each_row() -> None:
    model, data = mlp(), batches()
    net = cocktail.sparsify(model, ["unstructured@0.5"], EXAMPLE, score="wanda", calibration=data)
    x = torch.cat(data)
    with torch.no_grad():
        hidden = model[1](model[0](x))
    score = model[2].weight.detach().abs() * hidden.norm(dim=0)
    keep = net.mask_tensors("unstructured@0.5")["2.weight"]
    for row, kept in zip(score, keep.bool(), strict=True):
        assert int(kept.sum()) == 8
        assert float(row[~kept].max()) <= float(row[kept].min())


@pytest.mark.parametrize("score", ["wanda", "sparsegpt", "taylor", "fisher", "magnitude"])
def test_counts_are_exact_and_levels_nested_whatever_is_compared(score: str) -> None:
    model = mlp()
    data = [(x, torch.arange(4)) for x in batches()]
    levels = [0.21, 0.22, 0.5, 0.777, 1.0]
    patterns = [cocktail.Unstructured(levels), cocktail.NM(2, 4), cocktail.Block((2, 2), [0.3, 0.6])]
    net = cocktail.sparsify(model, patterns, EXAMPLE, score=score, calibration=data, loss_fn=F.cross_entropy)
    total = sum(w.numel for w in net.eligible)
    before = None
    for name in net.names:
        if not name.startswith("unstructured"):
            continue
        masks = net.mask_tensors(name)
        sparsity = net.subnet(name).sparsity
        assert sum(int((m == 0).sum()) for m in masks.values()) == round(sparsity * total)
        if before is not None:
            assert all(bool((masks[n].bool() <= before[n].bool()).all()) for n in masks if n in before)
        before = masks
    assert all(int(m.bool().unflatten(1, (-1, 4)).sum(-1).max()) == 2 for m in net.mask_tensors("2:4").values())


def test_largest_remainders_have_the_exact_sum_also_where_levels_rounded_up_before() -> None:
    sizes = torch.full((5,), 10)
    first = apportion(sizes, torch.zeros(5, dtype=torch.int64), 0.25, round(0.25 * 50))
    assert first.tolist() == [3, 3, 2, 2, 2]
    second = apportion(sizes, first, 0.27, round(0.27 * 50) - int(first.sum()))
    assert int((first + second).sum()) == 14 and int((first + second).max()) == 3


def test_taylor_and_fisher_are_autograds_gradients() -> None:
    model = mlp()
    data = [(x, torch.tensor([0, 1, 2, 3])) for x in batches(2)]
    model[2].weight.requires_grad_(False)
    net = cocktail.sparsify(model, ["unstructured@0.5"], EXAMPLE)
    found = {w.name: o for w, o in observe_gradients(model, net.eligible, CalibrationData.of(data), F.cross_entropy)}
    assert not model[2].weight.requires_grad and model[2].weight.grad is None
    model[2].weight.requires_grad_(True)
    grads = [torch.autograd.grad(F.cross_entropy(model(x), y), [model[2].weight])[0] for x, y in data]
    seen = found["2.weight"]
    assert seen.gradient is not None and seen.gradient_squares is not None
    torch.testing.assert_close(seen.gradient, (grads[0] + grads[1]) / 2)
    torch.testing.assert_close(seen.gradient_squares, (grads[0] ** 2 + grads[1] ** 2) / 2)


def test_activation_scores_a_unit_by_what_its_consumer_gets_of_it() -> None:
    model, data = mlp(), batches()
    net = cocktail.sparsify(
        model, ["channel@0.25"], EXAMPLE, target_modules=["0"], score="activation", calibration=data
    )
    with torch.no_grad():
        hidden = model[1](model[0](torch.cat(data)))
    score = hidden.norm(dim=0) * model[2].weight.detach().norm(dim=0)
    removed = net.mask_tensors("channel@0.25")["0.bias"] == 0
    assert int(removed.sum()) == 4
    assert float(score[removed].max()) <= float(score[~removed].min())


def test_padding_tokens_do_not_count() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    tokens = torch.randint(0, 32, (3, 6))
    mask = torch.ones(3, 6, dtype=torch.long)
    mask[0, 4:], mask[1, :2] = 0, 0
    padded = [{"input_ids": tokens, "attention_mask": mask}]
    alone = [{"input_ids": tokens[0:1, :4]}, {"input_ids": tokens[1:2, 2:]}, {"input_ids": tokens[2:3]}]
    net = cocktail.sparsify(model, ["unstructured@0.5"])
    a, b = observed(net, padded), observed(net, alone)
    for name, seen in a.items():
        other = b[name]
        assert seen is not None and other is not None
        assert seen.rows == other.rows == (14,)
        torch.testing.assert_close(seen.squares, other.squares)


def test_every_expert_has_the_inputs_that_were_routed_to_it_and_idle_ones_are_named(
    caplog: pytest.LogCaptureFixture,
) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.MixtralConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=1,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.MixtralForCausalLM(config).eval()
    data = [{"input_ids": torch.tensor([[1, 2, 3]])}]
    with caplog.at_level(logging.WARNING):
        net = cocktail.sparsify(model, ["unstructured@0.5", "2:4"], score="wanda", calibration=data)
    seen = observed(net, data)["model.layers.0.mlp.experts.down_proj"]
    assert seen is not None and seen.squares is not None and seen.squares.shape == (4, 24)
    assert sum(seen.rows) == 3
    assert "parts (experts) of 'model.layers.0.mlp.experts.gate_up_proj'" in caplog.text


def test_products_that_take_too_much_memory_at_once_are_summed_in_several_passes() -> None:
    net = cocktail.sparsify(mlp(), ["unstructured@0.5"], EXAMPLE)
    weights = list(net.coupling.weights)
    assert [len(g) for g in gram_groups(weights, 1)] == [1, 1, 1]
    assert [len(g) for g in gram_groups(weights, 4 * (144 + 256))] == [2, 1]
    assert [len(g) for g in gram_groups(weights)] == [3]


def test_the_model_and_the_global_state_are_left_as_they_were_also_after_a_failure() -> None:
    model = mlp().train()
    model[2].eval()
    before = {n: p.clone() for n, p in model.state_dict().items()}
    state = torch.get_rng_state()

    def fails(model: nn.Module, batch: Tensor) -> tuple[Tensor, None]:
        model(batch)
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        cocktail.sparsify(model, ["unstructured@0.5"], EXAMPLE, score="wanda", calibration=batches(), forward_fn=fails)
    assert model.training and not model[2].training
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())


def test_the_same_data_gives_the_same_masks() -> None:
    one, other = (
        cocktail.sparsify(mlp(), ["unstructured@0.5", "2:4"], EXAMPLE, score="sparsegpt", calibration=batches())
        for _ in range(2)
    )
    for name in ("unstructured@0.5", "2:4"):
        masks = other.mask_tensors(name)
        assert all(torch.equal(m, masks[n]) for n, m in one.mask_tensors(name).items())


def test_a_mapping_gives_each_pattern_its_score() -> None:
    net = cocktail.sparsify(
        mlp(),
        ["unstructured@0.5", "channel@0.25", "channel@0.25+2:4"],
        EXAMPLE,
        score={"channel": "activation", "*": "wanda"},
        calibration=batches(),
    )
    assert set(net.names) == {"dense", "unstructured@0.5", "channel@0.25", "channel@0.25+2:4"}


def test_a_score_can_be_written_outside_of_the_package() -> None:
    @register_score("random-like")
    class Sines(Score):
        def elements(self, weight, value, summary):  # type: ignore[no-untyped-def]
            return torch.arange(value.numel()).sin().abs().view(value.shape)

    net = cocktail.sparsify(mlp(), ["unstructured@0.5"], EXAMPLE, score="random-like")
    by_function = cocktail.sparsify(
        mlp(),
        ["unstructured@0.5"],
        EXAMPLE,
        score=lambda umg: {w.name: torch.arange(w.numel).sin().abs().view(w.shape) for w in umg.eligible},
    )
    masks = by_function.mask_tensors("unstructured@0.5")
    assert all(torch.equal(m, masks[n]) for n, m in net.mask_tensors("unstructured@0.5").items())


def test_impossible_requests_say_what_to_type() -> None:
    def made(**options: object) -> None:
        cocktail.sparsify(mlp(), ["unstructured@0.5"], EXAMPLE, **options)  # type: ignore[arg-type]

    with pytest.raises(cocktail.PatternError, match="did you mean 'wanda'"):
        made(score="wander")
    with pytest.raises(cocktail.PatternError, match="give calibration=loader"):
        made(score="wanda")
    with pytest.raises(cocktail.PatternError, match="channel units and experts, and the pattern 'unstructured' ranks"):
        made(score="activation", calibration=batches())
    with pytest.raises(cocktail.PatternError, match=r"write Wanda\(\)"):
        made(score=Wanda)

    class Own(Wanda):
        pass

    with pytest.raises(cocktail.PatternError, match="Own is not registered"):
        made(score=Own(), calibration=batches())
    with pytest.raises(cocktail.PatternError, match="put a single batch into a list"):
        made(score="wanda", calibration=torch.zeros(2, 12))
    with pytest.raises(cocktail.PatternError, match="no batches"):
        made(score="wanda", calibration=[])
    with pytest.raises(cocktail.PatternError, match="names the pattern 'chanel'"):
        made(score={"chanel": "wanda"})
    with pytest.raises(cocktail.PatternError, match="infinite or NaN"):
        made(score="wanda", calibration=[torch.full((2, 12), math.inf)])
    with pytest.raises(cocktail.TrainingError, match="give loss_fn"):
        made(score="taylor", calibration=batches())


def test_a_weight_that_is_not_used_on_the_data_is_named() -> None:
    class Sometimes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.last = nn.Linear(12, 8), nn.Linear(12, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor, other: bool = True) -> Tensor:
            x = self.first(x) + self.second(x) if other else self.first(x)
            return self.last(x.relu())

    with pytest.raises(cocktail.PatternError, match="inputs of 'second.weight' were not seen"):
        cocktail.sparsify(
            Sometimes(),
            ["unstructured@0.5"],
            EXAMPLE,
            score="wanda",
            calibration=batches(),
            forward_fn=lambda model, batch: (model(batch, False), None),
        )


def test_parametrized_weights_are_seen() -> None:
    model = mlp()
    nn.utils.parametrizations.weight_norm(model[2])
    net = cocktail.sparsify(model, ["unstructured@0.5"], EXAMPLE, score="wanda", calibration=batches())
    assert net.names == ("dense", "unstructured@0.5") or list(net.names) == ["dense", "unstructured@0.5"]


def test_bundles_record_the_score_by_pattern_and_the_data_it_was_judged_from(tmp_path: Path) -> None:
    patterns, data = ["unstructured@0.5", "channel@0.25"], batches()
    options = {"score": {"channel": "activation", "*": "wanda"}, "calibration": data}
    net = cocktail.sparsify(mlp(), patterns, EXAMPLE, **options)  # type: ignore[arg-type]
    expected = {
        "patterns": {"unstructured": "wanda", "channel": "activation"},
        "calibration": {"fingerprint": CalibrationData.of(data).fingerprint, "examples": 12},
    }
    assert net.provenance["score"] == expected
    net.save_pretrained(tmp_path / "bundle")
    assert cocktail.from_pretrained(tmp_path / "bundle", mlp()).provenance["score"] == expected
    plain = cocktail.sparsify(mlp(), patterns, EXAMPLE, calibration=data)
    assert "score" not in plain.provenance


def test_masks_that_are_made_again_rank_by_the_scores_that_are_given() -> None:
    net = cocktail.sparsify(mlp(), ["unstructured@0.5"], EXAMPLE, score="wanda", calibration=batches())
    scores = net.calibrate("wanda", batches())
    made = net.make_masks("unstructured@0.5", scores=scores)
    assert all(torch.equal(m, net.masks["unstructured@0.5"].elements[n]) for n, m in made.elements.items())
    assert any(not torch.equal(m, made.elements[n]) for n, m in net.make_masks("unstructured@0.5").elements.items())


def test_batches_of_a_loader_that_reuses_its_memory_are_kept_apart() -> None:
    def reusing() -> Iterator[Tensor]:
        memory = torch.empty(4, 12)
        for batch in batches():
            yield memory.copy_(batch)

    assert CalibrationData.of(reusing()).fingerprint == CalibrationData.of(batches()).fingerprint
    kept = CalibrationData.of(reusing()).batches
    assert all(torch.equal(a, b) for a, b in zip(kept, batches(), strict=True))


def test_the_units_scores_of_a_score_are_checked() -> None:
    @register_score("wrong-units")
    class Wrong(Score):
        def units(self, coupling, values, summaries):  # type: ignore[no-untyped-def]
            return torch.full((coupling.n_units,), math.nan)

    with pytest.raises(cocktail.PatternError, match="score 'wrong-units' returned scores that are not finite"):
        cocktail.sparsify(mlp(), ["channel@0.25"], EXAMPLE, score="wrong-units")
