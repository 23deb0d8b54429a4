"""Layers: whole blocks go, exactly the asked share, and slim models lose the elements of their lists."""

from __future__ import annotations

import copy
import json
import logging

import pytest
import torch
from block_models import WORDS, block_model, logits
from hypothesis import given
from hypothesis import strategies as st
from pattern_cases import assert_whole_way, sparse
from torch import nn

import cocktailsdk as cocktail
from cocktailsdk import Depth, Layers, PatternError
from cocktailsdk.graph import couple
from cocktailsdk.patterns import parse_pattern
from cocktailsdk.patterns.layers import layer_scores
from cocktailsdk.patterns.whole_layers import layers_of, removable_layers
from cocktailsdk.slimming.depth import Skipped

LISTS = {
    "llama": "model.layers",
    "gemma3": "model.layers",
    "mixtral": "model.layers",
    "mixtral, batched": "model.layers",
    "qwen3-moe": "model.layers",
    "gpt2": "transformer.h",
    "vit": "blocks",
}


@pytest.fixture(scope="module")
def llama():
    model, args, kwargs = block_model("llama")
    return cocktail.sparsify(model, [Layers([0.25, 0.5, 0.75])], args, kwargs)


@pytest.mark.parametrize("kind", LISTS)
def test_slim_models_have_fewer_layers_and_compute_what_masked_ones_do(kind):
    model, args, kwargs = block_model(kind)
    config = copy.deepcopy(vars(model.config)) if hasattr(model, "config") else None
    net = cocktail.sparsify(model, ["layers@0.5"], args, kwargs)
    assert [layer.path for layer in layers_of(net.coupling)] == [f"{LISTS[kind]}.{i}" for i in range(4)]
    small = net.slim("layers@0.5")
    assert len(small.get_submodule(LISTS[kind])) == 2
    assert not any(isinstance(m, Skipped) for m in small.modules())
    report = net.subnets()[1]
    assert report.sparsity_exact == 0.5
    assert report.coverage > 0.9
    assert sum(p.numel() for p in small.parameters()) == report.params
    with net.using("layers@0.5"), torch.no_grad():
        assert torch.equal(logits(small(*args, **kwargs)), logits(net(*args, **kwargs)))
    assert len(model.get_submodule(LISTS[kind])) == 4
    if config is not None:
        assert vars(model.config) == config


@pytest.mark.parametrize("kind", ["llama", "gemma3", "qwen3-moe", "gpt2"])
def test_slim_language_models_generate_with_a_cache_and_are_saved_by_their_configuration(kind, tmp_path):
    model, _, kwargs = block_model(kind)
    net = cocktail.sparsify(model, ["layers@0.5"], example_kwargs=kwargs)
    small = net.slim("layers@0.5")
    assert small.config.num_hidden_layers == 2
    options = {"input_ids": WORDS, "attention_mask": torch.ones_like(WORDS), "max_new_tokens": 6, "do_sample": False}
    with net.using("layers@0.5"):
        masked = model.generate(**options)
    assert torch.equal(small.generate(**options), masked)
    assert torch.equal(small.generate(**options, use_cache=False), masked)
    small.save_pretrained(tmp_path)
    read, found = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(found.values())
    with torch.no_grad():
        torch.testing.assert_close(read.eval()(**kwargs).logits, small(**kwargs).logits)


def test_blocks_of_a_resnet_go_where_their_shortcut_is_the_identity():
    model, args, _ = block_model("resnet")
    net = cocktail.sparsify(model, ["layers@0.5"], args)
    assert [layer.path for layer in layers_of(net.coupling)] == ["layer1.0", "layer1.1", "layer2.1"]
    small = net.slim("layers@0.5")
    assert sum(len(small.get_submodule(f"layer{i}")) for i in (1, 2, 3, 4)) == 4
    with net.using("layers@0.5"), torch.no_grad():
        assert torch.equal(small(*args), net(*args))


@given(sparsity=st.floats(0.0, 1.0), seed=st.integers(0, 3))
def test_the_asked_share_of_layers_goes_but_never_all(llama, sparsity, seed):
    pattern, umg = Layers([sparsity]), llama.umg()
    generator = torch.Generator().manual_seed(seed)
    umg.values.update({n: torch.randn(v.shape, generator=generator) for n, v in umg.values.items()})
    (subnet,) = pattern.subnets()
    mask = pattern.mask(subnet, umg)
    pattern.check(subnet, mask, umg)
    dropped = mask.dropped(llama.coupling)
    assert len(dropped) == 2 * min(round(sparsity * 4), 3)
    assert set(mask.elements) == {t for b in dropped for t in b.tensors}
    assert pattern.exact_sparsity(subnet, mask, umg) == len(dropped) / 8


def test_the_layers_of_least_score_go_nested(llama):
    layers = removable_layers(llama.coupling, llama.eligible)
    scores = layer_scores(llama.umg(), layers, 0.8)
    order = sorted(range(4), key=scores.__getitem__)
    for k, name in enumerate(llama.names[1:], 1):
        assert dropped(llama.masks[name], llama) == {layers[i].path for i in order[:k]}
    previous = llama.masks["layers@0.25"]
    umg = cocktail.UMG(
        llama.coupling, llama.eligible, llama.umg().values, previous,
        layer_scores={layer.path: -scores[i] for i, layer in enumerate(layers)},
    )  # fmt: skip
    mask = llama.patterns[0].mask(llama.subnet("layers@0.5"), umg)
    assert dropped(mask, llama) == {layers[order[0]].path, layers[order[-1]].path}


def dropped(mask, net):
    return {b.name.rpartition(".")[0] for b in mask.dropped(net.coupling)}


def test_given_scores_of_layers_win_over_those_of_branches(llama):
    umg = llama.umg()
    layers = removable_layers(umg.coupling, umg.eligible)
    names = [b.name for layer in layers for b in layer.branches]
    given = {name: float(i) for i, name in enumerate(names)}

    def scores(by):
        made = cocktail.UMG(umg.coupling, umg.eligible, umg.values, layer_scores=by)
        return layer_scores(made, layers, 0.8)

    assert scores(given) == [0.5, 2.5, 4.5, 6.5]
    assert scores({**given, layers[0].path: 9.0}) == [9.0, 2.5, 4.5, 6.5]
    assert scores({}) == layer_scores(umg, layers, 0.8)


def test_what_the_user_excludes_stays():
    model, args, kwargs = block_model("llama")
    net = cocktail.sparsify(
        model, [Layers([0.9])], args, kwargs, exclude_modules=["layers.1.mlp", "layers.3.self_attn"]
    )
    assert dropped(net.masks["layers@0.9"], net) <= {"model.layers.0", "model.layers.2"}
    assert net.subnets()[1].sparsity_exact == 0.5
    with pytest.raises(PatternError, match=r"no whole layer.*its 4 layers have weights that are not eligible.*'depth'"):
        cocktail.sparsify(model, ["layers"], args, kwargs, exclude_modules=["mlp"])


class PostNorm(nn.Module):
    """Norms on the stream itself."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.inner = nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x):
        return self.norm(x + self.inner(x))


class Stacked(nn.Module):
    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.first, self.blocks, self.last = nn.Linear(8, 8), nn.Sequential(*blocks), nn.Linear(8, 3)

    def forward(self, x):
        return self.last(self.blocks(self.first(x)))


def test_a_model_that_norms_its_stream_is_refused_with_the_norm():
    model = Stacked(PostNorm(), PostNorm()).eval()
    with pytest.raises(
        PatternError, match=r"'blocks\.0\.norm\.weight' in its lists belongs to no single residual branch"
    ):
        cocktail.sparsify(model, ["layers"], (torch.randn(2, 8),))
    assert cocktail.sparsify(model, [Depth([0.5])], (torch.randn(2, 8),)).subnets()[1].sparsity_exact == 0.5
    with pytest.raises(PatternError, match="it has no residual branch"):
        cocktail.sparsify(Stacked(nn.Linear(8, 8)).eval(), ["layers"], (torch.randn(2, 8),))


class Rectified(nn.Module):
    """What a block hands on without its branch is not what it was given, where that can be negative."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x):
        return (x + self.inner(x)).relu()


def test_a_block_that_changes_the_stream_stays_in_its_list(caplog):
    model = Stacked(Rectified(), Rectified()).eval()
    x = torch.randn(5, 8)
    net = cocktail.sparsify(model, ["layers@0.5"], (x,))
    shapes = net.coupling.shapes
    first = {t: torch.zeros(shapes[t], dtype=torch.bool) for t in layers_of(net.coupling)[0].tensors}
    net.set_mask("layers@0.5", cocktail.Mask(first))
    with caplog.at_level(logging.WARNING, logger="cocktailsdk"):
        small = net.slim("layers@0.5")
    assert "layers stay in the slim model's lists" in caplog.text
    assert len(small.blocks) == 2
    assert isinstance(small.blocks[0].inner, Skipped)
    with net.using("layers@0.5"), torch.no_grad():
        assert torch.equal(small(x), net(x))


class Staged(nn.Module):
    """A list of stages, each a list of blocks; one stage is nothing but blocks."""

    def __init__(self) -> None:
        super().__init__()
        blocks = [[nn.Linear(8, 8), nn.Linear(8, 8)], [nn.Linear(8, 8)]]
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 3)
        self.stages = nn.ModuleList(nn.ModuleList(stage) for stage in blocks)

    def forward(self, x):
        x = self.first(x)
        for stage in self.stages:
            for block in stage:
                x = x + block(x)
        return self.last(x)


def test_of_lists_in_lists_the_innermost_elements_are_layers():
    coupling = couple(Staged().eval(), (torch.randn(2, 8),))
    assert [layer.path for layer in layers_of(coupling)] == ["stages.0.0", "stages.0.1", "stages.1.0"]


def test_strings_and_arguments():
    assert parse_pattern("layers@0.25") == Layers([0.25])
    assert [s.name for s in Layers().subnets()] == ["layers@0.1", "layers@0.19", "layers@0.271"]
    assert Layers(**Layers([0.5], beta=0.3).config()) == Layers([0.5], beta=0.3)
    for bad in ({"beta": "x"}, {"sparsities": [1.5]}, {"rate": 1.0}):
        with pytest.raises(PatternError, match="layers"):
            Layers(**bad)


def test_a_mask_of_half_a_layer_is_refused(llama):
    pattern, subnet = llama.patterns[0], llama.subnet("layers@0.25")
    mask = llama.masks["layers@0.5"]
    with pytest.raises(PatternError, match="2 of the 4 layers are dropped, not 1"):
        pattern.check(subnet, mask, llama.umg())
    branch = llama.masks["layers@0.25"].dropped(llama.coupling)[0]
    half = {t: keep for t, keep in llama.masks["layers@0.25"].elements.items() if t in branch.tensors}
    with pytest.raises(PatternError, match="no layer is that holds it"):
        pattern.check(subnet, cocktail.Mask(half), llama.umg())


def test_layers_go_the_whole_way_and_only_names_are_stored(tmp_path):
    net = sparse("transformer", ["layers@0.5", "depth@0.25", "channel@0.25"])
    assert_whole_way(net, tmp_path / "bundle")
    entries = json.loads((tmp_path / "bundle" / "bundle.json").read_text())["masks"]
    assert [e["zeroed"] for e in entries if "zeroed" in e] == ["layers@0.5", "depth@0.25"]
