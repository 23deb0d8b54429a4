"""Every setting, with its default. Names are Detectron2's where it has the same thing."""

from __future__ import annotations

from typing import Any

DEFAULTS: dict[str, Any] = {
    "MODEL": {
        "META_ARCHITECTURE": "FasterRCNN",  # FasterRCNN, MaskRCNN, RetinaNet, DETR, or one of yours
        "WEIGHTS": "",  # .pth or .safetensors with the model's tensors, or with those of its backbone
        "DEVICE": "",  # cuda, cpu …; by default as --num-gpus says
        "PIXEL_MEAN": [0.485, 0.456, 0.406],
        "PIXEL_STD": [0.229, 0.224, 0.225],
        "BACKBONE": {
            "NAME": "resnet50",  # resnet18 … resnet152, vgg11 … vgg19_bn, or one of yours
            "NORM": "BN",  # BN, FrozenBN; of ResNets
            "FPN": True,  # a VGG without gives one map, of stride 16
            "FPN_CHANNELS": 256,
        },
        "ANCHORS": {"SIZES": [32, 64, 128, 256, 512], "RATIOS": [0.5, 1.0, 2.0]},
        "RPN": {
            "BATCH_SIZE_PER_IMAGE": 256,
            "PRE_NMS_TOPK_TRAIN": 2000,
            "PRE_NMS_TOPK_TEST": 1000,
            "POST_NMS_TOPK_TRAIN": 1000,
            "POST_NMS_TOPK_TEST": 1000,
        },
        "ROI_HEADS": {"BATCH_SIZE_PER_IMAGE": 512, "FC_DIM": 1024, "MASK_DIM": 256},
        "DETR": {
            "DIM": 256,
            "FFN_DIM": 2048,
            "HEADS": 8,
            "ENC_LAYERS": 6,
            "DEC_LAYERS": 6,
            "NUM_QUERIES": 100,
            # of the ResNet: channels and blocks of its four stages
            "STAGES": [256, 512, 1024, 2048],
            "BLOCKS": [3, 4, 6, 3],
            "BLOCK": "bottleneck",  # or basic
        },
    },
    "DATASETS": {
        "ROOT": "",  # the folder that holds coco/ and VOC2007/; by default what COCKTAIL_DATASETS names, or datasets/
        "REGISTER": {},  # name: {json: FILE, images: FOLDER or ZIP}, or {voc: FOLDER, split: NAME}
        "TRAIN": "coco_2017_train",
        "TEST": "coco_2017_val",
    },
    "INPUT": {
        "MIN_SIZE_TRAIN": [640, 672, 704, 736, 768, 800],  # of the shorter side; 0 leaves images as they are
        "MAX_SIZE_TRAIN": 1333,
        "MIN_SIZE_TEST": 800,
        "MAX_SIZE_TEST": 1333,
        "FLIP": "horizontal",  # horizontal, both, none
    },
    "DATALOADER": {"NUM_WORKERS": 4, "FILTER_EMPTY_ANNOTATIONS": True},
    "SOLVER": {
        "OPTIMIZER": "SGD",  # or AdamW
        "BASE_LR": 0.02,
        "MOMENTUM": 0.9,
        "WEIGHT_DECAY": 1e-4,
        "WARMUP": 0.05,  # share of every round's steps
        "CLIP_NORM": 0.0,  # 0: gradients are not clipped
        "IMS_PER_BATCH": 16,  # of all processes together
        "MAX_ITER": 90000,  # optimizer steps of the whole run
        "STEPS_PER_EPOCH": 0,  # 0: MAX_ITER / 100 or the whole set, whichever is less
        "PRECISION": "",  # bf16, fp16
    },
    "COCKTAIL": {
        "PATTERNS": ["unstructured", "n:m", "channel"],
        "EXCLUDE": [],  # modules that stay whole
        "RECIPE": "cocktail",  # mutualnet, paper, … : docs/recipes.md
        "START": "scratch",  # or pretrained: the weights given are those to which rounds rewind
        "DISTILL": True,  # sparse steps learn from the dense network's features and class logits, too
        "DISTILL_WEIGHT": 0.5,  # of that, beside the labels' loss; in 0 ... 1
        "DISTILL_FEATURES": 1.0,
        "DISTILL_LOGITS": 1.0,
        "HELD_OUT": 0,  # images of the training set kept for merging, where the recipe merges
        "RECALIBRATION_BATCHES": 8,
    },
    "TEST": {
        "NETWORKS": [],  # those that are evaluated; by default all
        "IMS_PER_BATCH": 4,
        "MAX_IMAGES": 0,  # 0: all
        "SCORE_THRESH": 0.05,
        "DETECTIONS_PER_IMAGE": 100,
    },
    "VIS": {"IMAGES": 2, "SCORE_THRESH": 0.5, "NETWORKS": []},
    "SEED": 0,
    "OUTPUT_DIR": "runs/detection",
}
