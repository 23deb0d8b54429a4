"""Finds the smallest member of every timm family, and writes them down.

    python benchmarks/zoo/families.py           families that the file lacks
    python benchmarks/zoo/families.py --again   all

Models are built on the meta device, so it takes minutes but no memory. Families whose smallest member takes images of
another kind than it says, or more than 200 M parameters, are kept as they are: the check will say what it finds.
"""

from __future__ import annotations

import json
import sys
import warnings

import timm
import torch
from models import FAMILIES, families


def smallest(family: str) -> str | None:
    """The member of fewest parameters."""
    sizes: dict[str, int] = {}
    for name in timm.list_models(module=family):
        try:
            with torch.device("meta"):
                sizes[name] = sum(p.numel() for p in timm.create_model(name, pretrained=False).parameters())
        except Exception:  # a constructor that looks at values cannot run without them
            continue
    if not sizes:
        return next(iter(timm.list_models(module=family)), None)
    return min(sizes, key=lambda n: (sizes[n], n))


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    found = families() if FAMILIES.exists() and "--again" not in sys.argv else {}
    missing = [family for family in timm.list_modules() if family not in found]
    found |= {family: name for family in missing if (name := smallest(family))}
    FAMILIES.write_text(json.dumps(dict(sorted(found.items())), indent=1) + "\n", encoding="utf-8")
    print(f"{len(found)} families, in {FAMILIES.name}")
