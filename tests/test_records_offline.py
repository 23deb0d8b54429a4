"""Building a listed class opens no socket, unpickles nothing, starts no process and writes no file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cocktailsdk.records import LIBRARIES, check_version, library

PROGRAM = Path(__file__).with_name("records_program.py")

FEW = (
    "test_resnet",
    "test_vit",
    "deit_tiny_patch16_224",
    "test_convnext",
    "mobilenetv3_small_050",
    "test_efficientnet",
)
FEW += ("swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256", "densenet121", "vgg11", "regnetx_002")
FEW += ("mixer_s32_224", "mobilevit_xxs")


def built(adapter: str, *names: str) -> dict[str, Any]:
    """What a process did that built listed classes. No offline flag helps it."""
    online = {k: v for k, v in os.environ.items() if k not in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")}
    done = subprocess.run(
        [sys.executable, str(PROGRAM), adapter, *names], capture_output=True, text=True, check=False, env=online
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("adapter", LIBRARIES)
def test_building_listed_classes_leads_nowhere(adapter: str) -> None:
    check_version(adapter)
    names = FEW if adapter == "timm" else ()
    found = built(adapter, *names)
    assert found["seen"] == []
    assert not {"kernels", "deepspeed", "flash_attn", "xformers", "requests"} & set(found["imported"])
    assert len(found["built"]) + len(found["failed"]) == len(names or library(adapter).entries)
    # Versions of timm before 1.0.20 cannot build vision transformers without memory.
    assert adapter == "timm" or found["failed"] == {}
    assert "test_resnet" in found["built"] or adapter != "timm"


@pytest.mark.slow
def test_building_every_listed_architecture_of_timm_leads_nowhere() -> None:
    found = built("timm")
    assert found["seen"] == []
    assert len(found["built"]) > 150


def test_sections_of_the_tables_are_where_the_libraries_have_their_classes() -> None:
    import timm
    import transformers

    for name, entry in library("transformers").entries.items():
        cls = getattr(transformers, name)
        assert cls.__module__.startswith("transformers.models."), name
        assert cls.config_class.model_type == entry.section, name
    for name, entry in library("timm").entries.items():
        if timm.is_model(name):
            assert timm.models.model_entrypoint(name).__module__ == f"timm.models.{entry.section}", name


def test_every_argument_of_a_listed_configuration_is_listed() -> None:
    import transformers

    never = {"_name_or_path", "transformers_version"}
    for name, entry in library("transformers").entries.items():
        config = getattr(transformers, name).config_class().to_dict()
        known = {*entry.fields, *entry.nested, *never}
        assert not set(config) - known, name
