"""A small model of every class that a bundle may have built, as its build record says it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from cocktailsdk.records import Bounds, library

_WORDS = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
_ENCODER = {**_WORDS, "intermediate_size": 24, "max_position_embeddings": 20, "pad_token_id": 0}
_DECODER = {**_ENCODER, "num_key_value_heads": 1, "head_dim": 8, "bos_token_id": 1, "eos_token_id": 2}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 12, "shared_expert_intermediate_size": 12}
_TEXT = {**_ENCODER, "bos_token_id": 1, "eos_token_id": 2}
_IMAGES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
_PICTURE = {**_IMAGES, "image_size": 16, "patch_size": 4}
_STAGES = {"hidden_sizes": [8, 8, 12, 16], "depths": [1, 1, 1, 1]}
_BART = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "vocab_size": 40}

CONFIGS: dict[str, dict[str, Any]] = {
    "bert": _ENCODER,
    "roberta": {**_ENCODER, "pad_token_id": 1},
    "electra": {**_ENCODER, "embedding_size": 8},
    "albert": {**_ENCODER, "embedding_size": 8},
    "distilbert": {"vocab_size": 40, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24},
    "bart": {**_BART, "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "num_labels": 3},
    "t5": {"vocab_size": 40, "d_model": 16, "num_layers": 1, "num_heads": 2, "d_kv": 8, "d_ff": 24},
    "gpt2": {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 20, "pad_token_id": 0},
    "llama": _DECODER,
    "mistral": _DECODER,
    "mixtral": {**_DECODER, "num_local_experts": 2},
    "qwen2": _DECODER,
    "qwen2_moe": {**_DECODER, **_EXPERTS, "num_experts": 2},
    "qwen3": _DECODER,
    "gemma": _DECODER,
    "gemma2": _DECODER,
    "phi3": {k: v for k, v in _DECODER.items() if k != "head_dim"},
    "vit": {**_PICTURE, "encoder_stride": 4},
    "deit": {**_PICTURE, "encoder_stride": 4},
    "swin": {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "image_size": 32, "window_size": 4},
    "convnext": _STAGES,
    "resnet": {**_STAGES, "embedding_size": 8, "layer_type": "basic"},
    "clip": {"text_config": _TEXT, "vision_config": _PICTURE, "projection_dim": 8},
    "clip_text_model": _TEXT,
    "clip_vision_model": _PICTURE,
}
"""Small configurations by the type of the model."""

WIDE = Bounds(tensors=4096, largest=1 << 20)
"""Limits that every model fits: the tests here are of what building does."""


def transformers_model(name: str) -> Any:
    """A small model of a listed class."""
    import transformers

    kind = library("transformers").entries[name].section
    cls = getattr(transformers, name)
    return cls(cls.config_class(**CONFIGS[kind]))


def every_record(adapter: str) -> Iterator[dict[str, Any]]:
    """A record for every listed class that the installed version has."""
    if adapter == "transformers":
        for name, entry in library(adapter).entries.items():
            config = {**CONFIGS[entry.section], "model_type": entry.section}
            yield {"adapter": adapter, "dtype": "float32", "record": {"class": name, "config": config}}
        return
    for name in library(adapter).entries:
        record = {"name": name, "options": {} if name.startswith("raft") else {"num_classes": 5}}
        yield {"adapter": adapter, "dtype": "float32", "record": record}
