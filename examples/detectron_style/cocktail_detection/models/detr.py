"""DETR, of transformers, built from a configuration with random weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import box_convert

from ..config import Config
from ..data import DetectionBatch
from .architecture import ARCHITECTURES, Architecture, Detection, Losses


def build(cfg: Config, classes: int) -> nn.Module:
    """DETR: a ResNet, an encoder, a decoder with learned queries. Classes begin with 0, and one more is none."""
    from transformers import DetrConfig, DetrForObjectDetection, ResNetConfig

    detr = cfg.MODEL.DETR
    backbone = ResNetConfig(
        hidden_sizes=detr.STAGES, depths=detr.BLOCKS, layer_type=detr.BLOCK, embedding_size=detr.STAGES[0] // 4,
        out_features=["stage4"],
    )  # fmt: skip
    config = DetrConfig(
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        backbone_config=backbone,
        d_model=detr.DIM,
        encoder_layers=detr.ENC_LAYERS,
        decoder_layers=detr.DEC_LAYERS,
        encoder_ffn_dim=detr.FFN_DIM,
        decoder_ffn_dim=detr.FFN_DIM,
        encoder_attention_heads=detr.HEADS,
        decoder_attention_heads=detr.HEADS,
        num_queries=detr.NUM_QUERIES,
        num_labels=classes,
        auxiliary_loss=True,
    )
    model = DetrForObjectDetection(config)
    model.detection = {  # what images are normalised by, and detections chosen by
        "mean": tuple(cfg.MODEL.PIXEL_MEAN),
        "std": tuple(cfg.MODEL.PIXEL_STD),
        "threshold": cfg.TEST.SCORE_THRESH,
        "most": cfg.TEST.DETECTIONS_PER_IMAGE,
    }
    return model


def padded(model: nn.Module, images: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Images normalised and put into one tensor, and which of its pixels are theirs."""
    mean, std = (torch.tensor(model.detection[k]).reshape(3, 1, 1) for k in ("mean", "std"))
    height, width = (max(image.shape[i] for image in images) for i in (1, 2))
    rows, inside = [], []
    for image in images:
        fill = (0, width - image.shape[2], 0, height - image.shape[1])
        rows.append(F.pad((image - mean.to(image)) / std.to(image), fill))
        inside.append(F.pad(torch.ones_like(image[0], dtype=torch.int64), fill))
    return torch.stack(rows), torch.stack(inside)


def frames(images: list[Tensor]) -> list[Tensor]:
    """Of each image the width, height, width, height that a box of 1 stands for; padding is not part of it."""
    return [image.new_tensor([image.shape[2], image.shape[1]] * 2) for image in images]


def losses(model: nn.Module, batch: DetectionBatch) -> Losses:
    """The matched losses, weighed as the model does; the encoder's output; and every query's classes."""
    pixels, inside = padded(model, batch.images)
    labels = [
        {"class_labels": t["labels"] - 1, "boxes": box_convert(t["boxes"] / frame, "xyxy", "cxcywh")}
        for t, frame in zip(batch.targets, frames(batch.images), strict=True)
    ]
    output = model(pixel_values=pixels, pixel_mask=inside, labels=labels)
    return Losses({"loss": output.loss}, [output.encoder_last_hidden_state], [output.logits])


def detect(model: nn.Module, images: list[Tensor]) -> list[Detection]:
    """The classes and boxes of the likeliest queries."""
    pixels, inside = padded(model, images)
    output = model(pixel_values=pixels, pixel_mask=inside)
    chosen, found = model.detection, []
    probabilities = output.logits.softmax(-1)[..., :-1]
    for scores, boxes, frame in zip(probabilities, output.pred_boxes, frames(images), strict=True):
        best, at = scores.flatten().topk(min(chosen["most"], scores.numel()))
        at, best = at[best > chosen["threshold"]], best[best > chosen["threshold"]]
        corners = box_convert(boxes[at // scores.shape[-1]], "cxcywh", "xyxy") * frame
        corners = corners.clamp(min=0).minimum(frame)
        found.append({"boxes": corners, "labels": at % scores.shape[-1] + 1, "scores": best})
    return found


def example(images: list[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The model takes one tensor, and which of its pixels are images'."""
    pixels = torch.stack(images)
    return (), {"pixel_values": pixels, "pixel_mask": torch.ones_like(pixels[:, 0], dtype=torch.int64)}


ARCHITECTURES["DETR"] = Architecture(build, losses, detect, example, softmax=True)
