"""Feed-forward width: of every MLP the asked share of hidden channels goes, of experts alike, and nothing else."""

from __future__ import annotations

import pytest
import timm
import torch
import transformers as hf
from block_models import WORDS, block_model, logits
from pattern_cases import assert_whole_way, sparse

import cocktailsdk as cocktail
from cocktailsdk import MLP, PatternError
from cocktailsdk.graph import couple
from cocktailsdk.patterns import parse_pattern
from cocktailsdk.patterns.unit_groups import mlp_groups, stream_groups

ROWS = {
    "llama": ("model.layers.{}.mlp.gate_proj.weight", 32),
    "mixtral": ("model.layers.{}.mlp.experts.gate_up_proj", 32),
    "mixtral, batched": ("model.layers.{}.mlp.experts.gate_up_proj", 32),
    "qwen3-moe": ("model.layers.{}.mlp.experts.gate_up_proj", 16),
    "gpt2": ("transformer.h.{}.mlp.c_fc.weight", 64),
    "vit": ("blocks.{}.mlp.fc1.weight", 64),
}


@pytest.mark.parametrize("kind", ROWS)
def test_slim_models_are_narrower_inside_their_mlps_and_compute_what_masked_ones_do(kind):
    model, args, kwargs = block_model(kind, layers=2)
    net = cocktail.sparsify(model, ["mlp@0.5"], args, kwargs)
    name, width = ROWS[kind]
    groups = {g.name: g for g in mlp_groups(net.coupling)}
    assert name.format(1) in next(g for n, g in groups.items() if ".1." in n).producers
    assert len(groups) == 2
    small = net.slim("mlp@0.5")
    changed = {
        n: (tuple(p.shape), tuple(small.get_parameter(n).shape))
        for n, p in model.named_parameters()
        if p.shape != small.get_parameter(n).shape
    }
    inside = {t.tensor for g in groups.values() for t in g.touches}
    assert set(changed) == inside
    assert all(".mlp." in n for n in changed)
    before, after = changed[name.format(1)]
    assert sum(before) - sum(after) == (width if "experts" in name else width // 2)
    report = net.subnets()[1]
    assert report.sparsity_exact == 0.5
    assert sum(p.numel() for p in small.parameters()) == report.params
    with net.using("mlp@0.5"), torch.no_grad():
        torch.testing.assert_close(logits(small(*args, **kwargs)), logits(net(*args, **kwargs)), rtol=1e-4, atol=1e-5)


def groups_of(model, args=(), kwargs=None):
    coupling = couple(model.eval(), args, kwargs, prove=False)
    names = [[g.name for g in found(coupling)] for found in (mlp_groups, stream_groups)]
    return names[0], names[1]


def hf_model(cls, config, **own):
    special = {"vocab_size": 32, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return getattr(hf, cls)(getattr(hf, config)(**special, **own))


SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
DEEPSEEK = {
    **SMALL, "num_key_value_heads": 2, "moe_intermediate_size": 16, "n_routed_experts": 4, "n_group": 2,
    "topk_group": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 0, "q_lora_rank": 8, "kv_lora_rank": 8,
    "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8,
}  # fmt: skip


@pytest.mark.parametrize(
    ("make", "mlps", "streams"),
    [
        # one branch holds attention and MLP
        (
            lambda: hf_model("GPTJForCausalLM", "GPTJConfig", n_embd=16, n_layer=1, n_head=2, rotary_dim=4),
            ["transformer.h.0.mlp.fc_in"],
            ["transformer"],
        ),
        # channels of low rank lie between the projections of queries
        (
            lambda: hf_model("DeepseekV3ForCausalLM", "DeepseekV3Config", **DEEPSEEK),
            ["model.layers.0.mlp.experts", "model.layers.0.mlp.shared_experts"],
            ["model"],
        ),
        # the norm comes after the sum
        (
            lambda: hf_model("BertForSequenceClassification", "BertConfig", **SMALL),
            ["bert.encoder.layer.0.intermediate.dense"],
            ["bert"],
        ),
        # layers share their weights, so that no branch is known
        (
            lambda: hf_model(
                "AlbertForSequenceClassification", "AlbertConfig", **{**SMALL, "num_hidden_layers": 2}, embedding_size=8
            ),
            [],
            ["albert.encoder"],
        ),
    ],
)
def test_feed_forward_channels_and_streams_are_told_from_the_channels_of_attention(make, mlps, streams):
    assert groups_of(make(), (), {"input_ids": WORDS, **({"use_cache": False} if mlps else {})}) == (mlps, streams)


@pytest.mark.parametrize(
    ("name", "mlps"),
    [
        ("seresnet18", []),  # squeeze and excitation scales channels, and adds nothing
        ("mobilenetv3_small_050", []),  # what is widened is filtered
        ("convnext_atto", ["stages.0.blocks.0.mlp.fc1", "stages.0.blocks.1.mlp.fc1"]),
    ],
)
def test_convolutional_networks_have_mlps_where_a_branch_sees_positions_one_by_one(name, mlps):
    found, streams = groups_of(timm.create_model(name, num_classes=3), (torch.randn(1, 3, 32, 32),))
    assert found[:2] == mlps
    assert streams == []


def test_a_model_without_mlps_is_refused_with_what_to_write():
    with pytest.raises(PatternError, match=r"'mlp@0\.5': this model has no feed-forward channels.*'channel@0\.5'"):
        sparse("convolutions", ["mlp@0.5"])


def test_widths_are_rounded_and_ranked_over_all_mlps():
    net = sparse("transformer", [MLP([0.3], scope="global", round_to=None)])
    groups = mlp_groups(net.coupling)
    assert int(net.masks["mlp@0.3"].removed.sum()) == round(0.3 * sum(g.size for g in groups))
    net = sparse("transformer", [MLP([0.3], round_to=8)])
    assert [int(net.masks["mlp@0.3"].removed[g.start : g.stop].sum()) for g in groups] == [8, 8]


def test_strings_and_arguments():
    assert parse_pattern("mlp@0.5") == MLP([0.5])
    assert [s.name for s in MLP().subnets()][:2] == ["mlp@0.1", "mlp@0.19"]
    pattern = MLP([0.5], beta=0.3, round_to=4, scope="global")
    assert MLP.from_config(pattern.config()) == pattern
    for bad in ({"beta": 2.0}, {"sparsities": [-1.0]}, {"round_to": 0}, {"scope": "all"}):
        with pytest.raises(PatternError, match="mlp"):
            MLP(**bad)


def test_mlps_go_the_whole_way_and_are_stored_by_unit(tmp_path):
    net = sparse("transformer", ["mlp@0.25", "mlp@0.5", "mlp@0.5+2:4"])
    loaded = assert_whole_way(net, tmp_path / "bundle")
    assert mlp_groups(loaded.coupling) == mlp_groups(net.coupling)
    small = net.slim("mlp@0.5")
    assert small.blocks[0].fc1.weight.shape == (12, 16)
    assert small.blocks[0].attn.q.weight.shape == (16, 16)
    assert cocktail.verify_nm(net.slim("mlp@0.5+2:4"), 2, 4)
