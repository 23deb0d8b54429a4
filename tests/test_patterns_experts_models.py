"""Experts of many architectures: slim equals masked, and the slim model's configuration says how many there are."""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from block_models import SIZES, WORDS

import cocktailsdk as cocktail
from cocktailsdk.graph import couple

MOE = {"num_hidden_layers": 1, "num_experts_per_tok": 2}
JAMBA = {"attn_layer_period": 1, "attn_layer_offset": 0, "expert_layer_period": 1, "expert_layer_offset": 0}
LATENT = {"q_lora_rank": None, "kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 4}

MODELS = {
    "Qwen2Moe": {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
    "Olmoe": {"num_experts": 4},
    "GptOss": {"num_local_experts": 4, "head_dim": 4},
    "GraniteMoe": {"num_local_experts": 4},
    "MiniMax": {"num_local_experts": 4, "head_dim": 4},
    "FlexOlmo": {"num_experts": 4},
    "Jamba": {"num_experts": 4, "use_mamba_kernels": False, **JAMBA},
}

LEFT_OUT = {
    "DeepseekV3": {"n_routed_experts": 4, "moe_intermediate_size": 16, "first_k_dense_replace": 0, **LATENT},
    "Phimoe": {"num_local_experts": 4},
    "Ernie4_5_Moe": {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16, "moe_layer_start_index": 0},
}


def tiny(name, options):
    heads = {"num_key_value_heads": 4, "n_group": 1, "topk_group": 1} if name == "DeepseekV3" else {}
    config = getattr(hf, f"{name}Config")(**{**SIZES, **MOE, **options, **heads})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(hf, f"{name}ForCausalLM")(config).eval()
        for parameter in model.parameters():
            if parameter.ndim > 1:  # some classes leave weights that a checkpoint has as they are in memory, or zero
                torch.nn.init.normal_(parameter, std=0.1)
    return model, {"input_ids": WORDS, "use_cache": False}


@pytest.mark.parametrize("name", MODELS)
def test_slim_equals_masked(name, tmp_path):
    model, kwargs = tiny(name, MODELS[name])
    net = cocktail.sparsify(model, ["experts@0.25"], example_kwargs=kwargs, score="activation", calibration=[kwargs])
    small = net.slim("experts@0.25")
    with net.using("experts@0.25"), torch.no_grad():
        masked = net(**kwargs).logits
    assert not torch.allclose(masked, net(**kwargs).logits, atol=1e-7)
    torch.testing.assert_close(small(**kwargs).logits, masked)
    small.save_pretrained(tmp_path)
    read, found = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(found.values())
    torch.testing.assert_close(read.eval()(**kwargs).logits, masked)


@pytest.mark.parametrize("name", LEFT_OUT)
def test_routers_that_choose_by_more_than_their_logits_are_left_out(name):
    model, kwargs = tiny(name, LEFT_OUT[name])
    assert couple(model, (), kwargs).experts == ()
