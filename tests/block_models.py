"""Models made of blocks that tests of patterns drop or narrow: transformers of a few thousand parameters, a ResNet."""

from __future__ import annotations

from typing import Any

import timm
import torch
import transformers as hf
from torch import nn

SIZES: dict[str, Any] = {
    "vocab_size": 48,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
WORDS = torch.arange(3, 15).reshape(2, 6)
IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def _made(kind: str, layers: int) -> nn.Module:
    if kind == "llama":
        return hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES, num_hidden_layers=layers))
    if kind == "gemma3":  # attends to a window in every other layer
        types = ["sliding_attention", "full_attention"] * (layers // 2)
        config = hf.Gemma3TextConfig(
            **SIZES, num_hidden_layers=layers, head_dim=4, sliding_window=3, layer_types=types, query_pre_attn_scalar=4
        )
        return hf.Gemma3ForCausalLM(config)
    if kind.startswith("mixtral"):
        config = hf.MixtralConfig(**SIZES, num_hidden_layers=layers, num_local_experts=4, num_experts_per_tok=2)
        model = hf.MixtralForCausalLM(config)
        if kind == "mixtral, batched":
            model.set_experts_implementation("batched_mm")
        return model
    if kind == "qwen3-moe":
        moe = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2, "mlp_only_layers": [0]}
        return hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(**SIZES, **moe, num_hidden_layers=layers, head_dim=4))
    if kind == "gpt2":
        special = {name: SIZES[name] for name in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")}
        return hf.GPT2LMHeadModel(hf.GPT2Config(**special, n_embd=16, n_layer=layers, n_head=4, n_positions=32))
    if kind == "vit":
        return timm.create_model(
            "vit_tiny_patch16_224",
            img_size=16, patch_size=8, embed_dim=16, depth=layers, num_heads=2, num_classes=5,
        )  # fmt: skip
    if kind == "resnet":
        return timm.models.ResNet(timm.models.resnet.BasicBlock, [2, 2, 1, 1], num_classes=5, channels=(64, 16, 16, 16))
    raise ValueError(kind)


def block_model(kind: str, layers: int = 4) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """A model in eval mode whose norms do something, with positional and keyword inputs."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = _made(kind, layers).eval()
        for module in model.modules():
            weight = getattr(module, "weight", None)
            if "Norm" in type(module).__name__ and weight is not None:
                weight.data.uniform_(0.5, 2.0)
                if isinstance(module, nn.LayerNorm | nn.BatchNorm2d):
                    module.bias.data.normal_()
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2.0)
    if kind in ("vit", "resnet"):
        return model, (IMAGES,), {}
    return model, (), {"input_ids": WORDS, "use_cache": False}


def logits(output: Any) -> torch.Tensor:
    """The tensor that tests compare."""
    return getattr(output, "logits", output)
