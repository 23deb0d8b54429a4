"""Which parts of each detector can be pruned, and why the rest stays whole.

    python benchmarks/detection_parts.py

Small backbones on small images: the parts, and the reasons, are those of large ones. What examples/detectron_style's
`analyze_model.py --tasks prunable` shows goes to benchmarks/results/detection_parts.json; docs/detection.md shows it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from cocktailsdk.io.atomic import write_json

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "detectron_style"
RESULTS = Path(__file__).resolve().parent / "results" / "detection_parts.json"
sys.path.append(str(EXAMPLE))

VGG = ("MODEL.BACKBONE.NAME", "vgg11_bn", "MODEL.BACKBONE.FPN", "false")
DETR = ("DIM", "64", "FFN_DIM", "128", "HEADS", "4", "ENC_LAYERS", "1", "DEC_LAYERS", "1", "NUM_QUERIES", "20",
        "STAGES", "[32, 48, 64, 96]", "BLOCKS", "[1, 1, 1, 1]", "BLOCK", "basic")  # fmt: skip
DETECTORS: Mapping[str, tuple[str, ...]] = {
    "Mask R-CNN, ResNet-18-FPN": ("MODEL.META_ARCHITECTURE", "MaskRCNN"),
    "Faster R-CNN, VGG-11": ("MODEL.META_ARCHITECTURE", "FasterRCNN", *VGG),
    "RetinaNet, ResNet-18-FPN": ("MODEL.META_ARCHITECTURE", "RetinaNet"),
    "DETR, small": (
        "MODEL.META_ARCHITECTURE", "DETR", *(f"MODEL.DETR.{w}" if w.isupper() else w for w in DETR),
    ),
}  # fmt: skip
"""Settings of the example's scripts, by title. Faster R-CNN with a pyramid is Mask R-CNN without its mask head."""


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=list(DETECTORS), default=list(DETECTORS))
    parser.add_argument("--side", type=int, default=96, help="of the example images")
    parser.add_argument("--results", type=Path, default=RESULTS)
    asked = parser.parse_args()
    from cocktail_detection.analysis import left_whole, parts_found
    from cocktail_detection.catalog import register_builtin
    from cocktail_detection.config import get_cfg
    from cocktail_detection.engine import Setup

    register_builtin()
    for title in asked.only:
        cfg = get_cfg()
        cfg.merge_from_file(EXAMPLE / "configs" / "Base-small.yaml")
        cfg.merge_from_list([*DETECTORS[title], "INPUT.MIN_SIZE_TEST", str(asked.side), "COCKTAIL.PATTERNS", "2:4"])
        net = Setup.of(cfg, classes=3).net()
        found = json.loads(asked.results.read_text(encoding="utf-8")) if asked.results.exists() else {}
        found[title] = {"parts": [asdict(part) for part in parts_found(net)], "code": left_whole(net)}
        asked.results.parent.mkdir(parents=True, exist_ok=True)
        ordered = {name: found[name] for name in DETECTORS if name in found}
        write_json(asked.results, ordered)
        print(f"{title}: {len(found[title]['parts'])} parts")
    return 0


if __name__ == "__main__":
    sys.exit(main())
