"""The models that channel pruning is judged on, built offline with random weights."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

FAMILIES = Path(__file__).with_name("timm_families.json")
"""By timm family (``timm.list_modules()``) its member of fewest parameters; ``families.py`` writes it."""

HF = """bert albert deberta-v2 mpnet mobilebert t5 gpt2 gpt_neo opt llama mistral qwen2 qwen3 gemma gemma2 phi3 mixtral
mamba vit deit swin swinv2 convnext mobilenet_v1 mobilevit segformer dinov3_vit detr mask2former clip whisper hubert dpt
levit pvt data2vec-vision bloom modernbert xlnet patchtst""".split()
"""Transformers model types."""

AS_THEY_ARE = set(
    """swin swinv2 convnext convnextv2 resnet regnet mobilenet_v1 mobilenet_v2 mobilevit segformer detr rt_detr
    mask2former poolformer efficientnet bit levit pvt efficientformer mobilebert clip siglip dpt depth_anything
    squeezebert funnel""".split()
)
"""Types whose default configuration is small, or whose sizes depend on each other; the others are made small."""

SMALL: dict[str, int] = {
    **dict.fromkeys(["hidden_size", "d_model", "n_embd", "dim", "embedding_size"], 64),
    **dict.fromkeys(["num_hidden_layers", "num_layers", "n_layers", "n_layer", "encoder_layers", "decoder_layers"], 2),
    **dict.fromkeys(["num_attention_heads", "n_heads", "n_head", "num_heads"], 4),
    **dict.fromkeys(["encoder_attention_heads", "decoder_attention_heads"], 4),
    **dict.fromkeys(["intermediate_size", "ffn_dim", "hidden_dim", "d_ff", "encoder_ffn_dim", "decoder_ffn_dim"], 128),
    **dict.fromkeys(["moe_intermediate_size", "shared_expert_intermediate_size"], 64),
    **dict.fromkeys(["num_local_experts", "num_experts"], 4),
    **dict.fromkeys(["max_position_embeddings", "n_positions"], 128),
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 512,
}

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


def families() -> dict[str, str]:
    """Every timm family with its smallest member."""
    found: dict[str, str] = json.loads(FAMILIES.read_text(encoding="utf-8"))
    return found


def build(name: str) -> tuple[nn.Module, Inputs]:
    """A model in eval mode by ``timm:NAME`` or ``hf:TYPE``, and inputs for one pass."""
    warnings.filterwarnings("ignore")
    kind, _, what = name.partition(":")
    torch.manual_seed(0)
    if kind == "timm":
        import timm

        model = timm.create_model(what, pretrained=False).eval()
        size = model.default_cfg.get("input_size", (3, 224, 224))
        return model, ((torch.randn(1 if size[-1] > 400 else 2, *size),), {})
    return _transformers(what)


def _transformers(kind: str) -> tuple[nn.Module, Inputs]:
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.for_model(kind)
    for key, value in SMALL.items() if kind not in AS_THEY_ARE else ():
        if hasattr(config, key):
            try:
                setattr(config, key, value)
            except (AttributeError, NotImplementedError, TypeError):  # derived from others in some configurations
                continue
    if kind == "deberta-v2":
        config.relative_attention = True
    for key in ("pad_token_id", "bos_token_id", "eos_token_id"):
        token = getattr(config, key, None)
        if isinstance(token, int) and token >= getattr(config, "vocab_size", token + 1):
            setattr(config, key, 0)
    if hasattr(config, "use_cache"):
        config.use_cache = False
    if hasattr(config, "use_pretrained_backbone"):
        config.use_pretrained_backbone = False
    # The default kernel of the experts has no float64.
    more = {"experts_implementation": "batched_mm"} if kind in ("mixtral", "qwen2_moe") else {}
    model = AutoModel.from_config(config, **more).eval()
    return model, ((), _keywords(kind, model, config))


def _keywords(kind: str, model: Any, config: Any) -> dict[str, Tensor]:
    ids = torch.randint(5, 100, (2, 16))
    size = getattr(config, "image_size", None) or getattr(getattr(config, "vision_config", None), "image_size", None)
    size = size or 224
    size = size if isinstance(size, int) else size[0]
    if kind in ("detr", "rt_detr", "mask2former"):
        size = 256
    if kind == "patchtst":
        return {"past_values": torch.randn(2, config.context_length, config.num_input_channels)}
    if kind == "videomae":
        return {"pixel_values": torch.randn(1, config.num_frames, 3, size, size)}
    if kind in ("clip", "siglip"):
        return {"input_ids": ids[:, :8], "pixel_values": torch.randn(2, 3, size, size)}
    if kind in ("wav2vec2", "hubert"):
        return {"input_values": torch.randn(2, 8000)}
    if kind == "whisper":
        return {"input_features": torch.randn(1, config.num_mel_bins, 3000), "decoder_input_ids": ids[:1, :8]}
    if kind in ("t5", "bart"):
        return {"input_ids": ids, "decoder_input_ids": ids[:, :8]}
    if getattr(model, "main_input_name", "input_ids") == "pixel_values":
        return {"pixel_values": torch.randn(2, 3, size, size)}
    return {"input_ids": ids}


def first(output: Any) -> Tensor:
    """The tensor of an output that is compared."""
    if isinstance(output, Tensor):
        return output
    for key in ("logits", "last_hidden_state", "pooler_output", "image_embeds"):
        value = getattr(output, key, None)
        if isinstance(value, Tensor):
            return value
    for value in output.values() if hasattr(output, "values") else output:
        if isinstance(value, Tensor) and value.is_floating_point():
            return value
        for inner in value if isinstance(value, tuple | list) else ():
            if isinstance(inner, Tensor):
                return inner
    raise TypeError("no tensor in the output")


def names() -> list[str]:
    """Every timm family's smallest member, and the transformers types."""
    return [f"timm:{n}" for n in families().values()] + [f"hf:{n}" for n in HF]
