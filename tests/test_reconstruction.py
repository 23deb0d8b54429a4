"""Subnetworks whose remaining weights make up for the others, and runs of a model block by block."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import cocktailsdk as cocktail
from cocktailsdk.calibration import CalibrationData
from cocktailsdk.calibration.replay import Replay, WholeModel, find_chain
from cocktailsdk.patterns.scores import Wanda, register_score
from cocktailsdk.slimming.least_squares import masked_least_squares, output_error


def correlated(rows: int, n: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, n, generator=generator) @ torch.randn(n, n, generator=generator)


def llama(layers: int = 3) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=48, hidden_size=16, intermediate_size=40, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model: nn.Module = transformers.LlamaForCausalLM(config).eval()
    return model


def texts(n: int = 10) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [{"input_ids": torch.randint(0, 48, (4, 12), generator=generator)} for _ in range(n)]


def test_conjugate_gradients_find_the_least_squares_solution_of_each_row() -> None:
    x = correlated(200, 12).double()
    weight, keep = torch.randn(1, 5, 12).double(), torch.rand(1, 5, 12) < 0.6
    gram, damping = (x.T @ x)[None], 0.01
    found = masked_least_squares(weight, keep, gram, damping, iterations=200)
    extra = damping * gram[0].diagonal().mean() * torch.eye(12).double()
    for row in range(5):
        s = keep[0, row]
        a = (gram[0] + extra)[s][:, s]
        want = torch.linalg.solve(a, ((gram[0] + extra) @ weight[0, row])[s])
        torch.testing.assert_close(found[0, row, s], want, rtol=5e-3, atol=5e-3)
        assert bool((found[0, row, ~s] == 0).all())


@pytest.mark.parametrize("iterations", [1, 2, 5, 30])
def test_every_iteration_makes_outputs_closer(iterations: int) -> None:
    x = correlated(100, 16)
    weight, keep = torch.randn(1, 8, 16), torch.rand(1, 8, 16) < 0.5
    gram = (x.T @ x)[None]
    less = masked_least_squares(weight, keep, gram, 1e-4, iterations - 1)
    more = masked_least_squares(weight, keep, gram, 1e-4, iterations)
    assert output_error(weight, more, gram) <= output_error(weight, less, gram) * (1 + 1e-5)


def test_inputs_without_energy_change_nothing() -> None:
    weight, keep = torch.randn(1, 3, 4), torch.rand(1, 3, 4) < 0.5
    found = masked_least_squares(weight, keep, torch.zeros(1, 4, 4), 0.01)
    assert torch.equal(found, weight * keep)


@pytest.mark.parametrize("pattern", ["unstructured@0.5", "2:4", "channel@0.25"])
def test_a_reconstructed_language_model_is_closer_to_the_dense_one(pattern: str) -> None:
    model, data = llama(), texts()
    net = cocktail.sparsify(model, [pattern], score="wanda" if pattern[0] != "c" else "magnitude", calibration=data)
    before = {name: p.clone() for name, p in net.state_dict().items()}
    made = cocktail.reconstruct(net, pattern, data)
    assert all(torch.equal(p, before[name]) for name, p in net.state_dict().items())
    assert not net.private.get(pattern)
    held = texts(12)[-2:]
    plain = net.slim(pattern)

    def error(other: nn.Module) -> float:
        with torch.no_grad():
            return sum(float((other(**b).logits - model(**b).logits).square().mean()) for b in held)

    assert error(made) < error(plain)
    if pattern == "2:4":
        assert not cocktail.verify_nm(made, 2, 4).failures


def test_a_convolutional_network_is_reconstructed_and_its_statistics_measured() -> None:
    torch.manual_seed(0)

    def block(i: int, o: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU())

    model = nn.Sequential(
        block(3, 12), block(12, 12), block(12, 12), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 4)
    )
    images = [torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(6)]
    for x in images:
        model(x)
    model.eval()
    net = cocktail.sparsify(model, ["unstructured@0.6"], images[0], score="wanda", calibration=images)
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    made = cocktail.reconstruct(net, "unstructured@0.6", images)
    assert all(torch.equal(b, buffers[name]) for name, b in model.named_buffers())
    net.recalibrate("unstructured@0.6", images)
    plain = net.slim("unstructured@0.6").eval()
    test = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(99))
    with torch.no_grad():
        want = model(test)
        assert float((made.eval()(test) - want).square().mean()) < float((plain(test) - want).square().mean())


def test_a_model_that_is_a_chain_is_found_and_replayed_exactly() -> None:
    model, data = llama(), CalibrationData.of(texts(2))
    names = find_chain(model, data)
    assert names == ("model.layers.0", "model.layers.1", "model.layers.2")
    replay = Replay.capture(model, data, None, names)
    for k in range(3):
        replay.advance(k)
    with torch.no_grad():
        for batch, state in zip(data.batches, replay.states, strict=True):
            hidden = model.model(**batch).last_hidden_state
            assert torch.equal(model.model.norm(state), hidden)
    assert model.config.use_cache and all(not m._forward_hooks for m in model.modules())


def test_a_model_that_is_no_chain_is_run_as_a_whole_and_gets_its_values_back() -> None:
    class Skips(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)])

        def forward(self, x: Tensor) -> Tensor:
            a, b, c = self.parts
            return c(a(x).relu() + b(x).relu())

    torch.manual_seed(0)
    model, data = Skips().eval(), list(correlated(450, 6).split(50))
    assert find_chain(model, CalibrationData.of(data)) == ()
    net = cocktail.sparsify(model, ["unstructured@0.5"], (data[0],), score="wanda", calibration=data)
    before = {name: p.clone() for name, p in net.state_dict().items()}
    made = cocktail.reconstruct(net, "unstructured@0.5", data)
    assert all(torch.equal(p, before[name]) for name, p in net.state_dict().items())
    x = data.pop()
    with torch.no_grad():
        want = model(x)
        assert (made(x) - want).square().mean() < (net.slim("unstructured@0.5")(x) - want).square().mean()
    value = model.parts[0].weight.detach().clone()
    passes = WholeModel.of(model, net.eligible, CalibrationData.of(data), None)
    passes.advance(0, {"weight": torch.zeros(6, 6)})
    passes.close()
    assert torch.equal(model.parts[0].weight, value)


def test_blocks_are_judged_by_what_the_pruned_blocks_before_return() -> None:
    model, data = llama(2), texts(3)
    one, other = (
        cocktail.sparsify(model, ["unstructured@0.6"], score="wanda", calibration=data, sequential=sequential)
        for sequential in (False, True)
    )
    a, b = one.mask_tensors("unstructured@0.6"), other.mask_tensors("unstructured@0.6")
    first = [n for n in a if n.startswith("model.layers.0")]
    second = [n for n in a if n.startswith("model.layers.1")]
    assert all(torch.equal(a[n], b[n]) for n in first)
    assert not all(torch.equal(a[n], b[n]) for n in second)
    total = sum(w.numel for w in other.eligible)
    assert sum(int((m == 0).sum()) for m in b.values()) == round(0.6 * total)
    # by hand: the second block's inputs, the first block pruned
    with other.using("unstructured@0.6"), torch.no_grad():
        inputs: list[Tensor] = []
        layer = model.model.layers[1].self_attn.q_proj
        handle = layer.register_forward_pre_hook(lambda m, args: inputs.append(args[0].flatten(0, 1)))
        for batch in data:
            model(**batch)
        handle.remove()
    score = layer.weight.detach().abs() * torch.cat(inputs).norm(dim=0)
    keep = b["model.layers.1.self_attn.q_proj.weight"].bool()
    for row, kept in zip(score, keep, strict=True):
        assert float(row[~kept].max()) <= float(row[kept].min()) * (1 + 1e-5)


def test_masks_are_made_from_the_dense_network_whatever_is_active() -> None:
    model, data = llama(2), texts(3)
    net = cocktail.sparsify(model, ["unstructured@0.6"], score="wanda", calibration=data, sequential=True)
    scores = net.calibrate("wanda", data, sequential=True)
    want = net.masks["unstructured@0.6"]
    with net.using("unstructured@0.6"):
        mask = net.make_masks("unstructured@0.6", scores=scores)
    assert all(torch.equal(m, want.elements[n]) for n, m in mask.elements.items())


def test_what_cannot_be_judged_block_by_block_is_refused_before_any_work() -> None:
    data = texts(2)
    with pytest.raises(cocktail.PatternError, match="compares all blocks' weights"):
        cocktail.sparsify(llama(2), ["unstructured@0.5"], score=_Global(), calibration=data, sequential=True)
    with pytest.raises(cocktail.PatternError, match="no pattern here is ranked so"):
        cocktail.sparsify(llama(2), ["unstructured@0.5"], sequential=True)
    net = cocktail.sparsify(llama(2), ["unstructured@0.5"])
    with pytest.raises(cocktail.PatternError, match="give smaller batches"):
        cocktail.reconstruct(net, "unstructured@0.5", data[:1])
    with pytest.raises(cocktail.SubnetError):
        cocktail.reconstruct(net, "2:4", data)


@register_score("global-wanda")
class _Global(Wanda):
    comparison = "global"
