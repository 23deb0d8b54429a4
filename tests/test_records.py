"""A stranger's build record is loaded as it was saved, or refused before a model library is touched."""

from __future__ import annotations

import copy
import json
import logging
import resource
import shutil
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from record_models import transformers_model
from test_bundle_damage import rewrite
from torch import nn

import cocktailsdk as cocktail
from cocktailsdk import BundleError
from cocktailsdk.errors import AdapterError
from cocktailsdk.models import best_record, rebuilt
from cocktailsdk.records import Bounds, check_record, check_version, fenced, library, tables

WORDS = torch.arange(12).view(1, 12)
BOUNDS = Bounds(tensors=24, largest=40)

seen: list[str] = []
watching = False


def watch(event: str, args: tuple[object, ...]) -> None:
    """Note what no bundle may cause. The hook stays for good, and does nothing once the tests here are over."""
    if watching and (event.startswith(("socket.", "subprocess.")) or event in ("pickle.find_class", "builtins.input")):
        seen.append(f"{event} {args}")
    elif watching and event == "open" and "planted" in str(args[0]):
        seen.append(f"opened {args[0]}")


@pytest.fixture(scope="module", autouse=True)
def _watched():
    global watching
    sys.addaudithook(watch)
    watching = True
    yield
    watching = False


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    torch.manual_seed(0)
    net = cocktail.sparsify(transformers_model("BertForSequenceClassification"), ["2:4"], (WORDS,))
    path = tmp_path_factory.mktemp("saved") / "bundle"
    net.save_pretrained(path)
    return path


@pytest.fixture
def bundle(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "bundle")


def record_in(bundle: Path) -> dict[str, Any]:
    return json.loads((bundle / "bundle.json").read_text())["build"]


def put(bundle: Path, build: Any) -> Path:
    """Put a build record into a bundle, with a right checksum."""
    rewrite(bundle, lambda meta: meta.update(build=build))
    return bundle


def of_transformers(name: str, **config: Any) -> dict[str, Any]:
    return {"adapter": "transformers", "dtype": "float32", "record": {"class": name, "config": config}}


def of(adapter: str, name: str, **options: Any) -> dict[str, Any]:
    return {"adapter": adapter, "dtype": "float32", "record": {"name": name, "options": options}}


VIT = {"model_type": "vit", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
REMOTE = {"AutoModelForCausalLM": "someone/repo--code.C"}
ALWAYS = {
    "nested auto_map": of_transformers("VisionEncoderDecoderModel", encoder=VIT, decoder={**VIT, "auto_map": REMOTE}),
    "auto_map": of_transformers("BertModel", auto_map={"AutoModel": "someone/repo--code.C"}),
    "remote code": of_transformers("DetrModel", trust_remote_code=True),
    "hub kernel": of_transformers("LlamaModel", attn_implementation="someone/kernel"),
    "hub kernel by its usual name": of_transformers("PhiModel", attn_implementation="flash_attention_2"),
    "private kernel": of_transformers("PhiModel", _attn_implementation="someone/kernel"),
    "private kernel inside": of_transformers("AltCLIPModel", text_config={"_attn_implementation_internal": "a/b"}),
    "experts": of_transformers("PhimoeModel", experts_implementation="sonicmoe"),
    "checkpoint": of_transformers(
        "TimmWrapperModel", architecture="resnet18", model_args={"checkpoint_path": "planted"}
    ),
    "checkpoint inside": of_transformers("DetrModel", backbone_config={"model_args": {"checkpoint_path": "planted"}}),
    "backbone": of_transformers("DetrModel", backbone="resnet50", use_timm_backbone=True),
    "pretrained backbone": of_transformers("DPTForDepthEstimation", use_pretrained_backbone=True),
    "backbone on the hub": of_transformers("UperNetForSemanticSegmentation", backbone="someone/repo"),
    "quantization": of_transformers("BertModel", quantization_config={"quant_method": "gptq"}),
    "quantization elsewhere": of_transformers("PhiModel", quantization_config={"quant_method": "mxfp4"}),
    "name": of_transformers("BertModel", _name_or_path="someone/repo"),
    "path": of_transformers("RagModel", index_path="planted", passages_path="planted"),
    "labels": of_transformers("BertModel", num_labels=4_000_000),
    "labels elsewhere": of_transformers("PhiForSequenceClassification", num_labels=4_000_000),
    "labels inside": of_transformers("AltCLIPModel", text_config={"num_labels": 4_000_000}),
    "dtype": of_transformers("BertModel", dtype="load"),
    "torch_dtype": of_transformers("PhiModel", torch_dtype="hub"),
    "auto class": of_transformers("AutoModel"),
    "base class": of_transformers("PreTrainedModel"),
    "function": of_transformers("pipeline", task="text-generation"),
    "dunder": of_transformers("__class__"),
    "dotted": of_transformers("models.bert.BertModel"),
    "huge": of_transformers("PhiModel", hidden_size=10**400),
    "layers": of_transformers("PhiModel", num_hidden_layers=10**6),
    "timm on the hub": of("timm", "hf-hub:someone/repo"),
    "timm from a folder": of("timm", "local-dir:planted"),
    "timm with a tag": of("timm", "resnet18.a1_in1k"),
    "timm pretrained": of("timm", "resnet18", pretrained=True),
    "timm checkpoint": of("timm", "resnet18", checkpoint_path="planted"),
    "timm overlay": of("timm", "resnet18", pretrained_cfg_overlay={"file": "planted"}),
    "timm layer": of("timm", "resnet18", norm_layer="planted"),
    "torchvision weights": of("torchvision", "resnet18", weights="DEFAULT"),
    "torchvision backbone": of("torchvision", "fcn_resnet50", weights_backbone="DEFAULT"),
    "torchvision class": of("torchvision", "ResNet"),
    "another adapter": of("somebody", "resnet18"),
    "a list": of("timm", "resnet18") | {"adapter": ["timm"]},
    "no record": {"adapter": "timm", "record": None, "dtype": "float32"},
    "number": 7,
}
"""Refused whether the bundle's maker is trusted or not."""


@pytest.mark.parametrize("trust", [False, True])
@pytest.mark.parametrize("what", ALWAYS)
def test_a_record_that_leads_elsewhere_is_refused(bundle: Path, what: str, trust: bool) -> None:
    put(bundle, ALWAYS[what])
    seen.clear()
    with pytest.raises(BundleError, match=r"pass the model: from_pretrained\(bundle, model\)") as error:
        cocktail.from_pretrained(bundle, trust_build_record=trust)
    assert seen == []
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 700


@pytest.mark.parametrize("what", ALWAYS)
def test_a_record_is_refused_before_its_library_is_imported(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("timm", "torchvision", "transformers"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it raises
        monkeypatch.setitem(sys.modules, f"cocktail_adapters.{name}", None)
    with pytest.raises(AdapterError, match="pass the model"):
        rebuilt(ALWAYS[what], bounds=BOUNDS)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"frobnicate": 1}, "'frobnicate', which is not among its listed arguments"),
        ({"_private": 1}, "'_private'"),
        ({"hidden_size": 41}, "from 0 to 40, the bundle's largest dimension"),
        ({"hidden_size": -1}, "whole number"),
        ({"hidden_size": 16.0}, "whole number"),
        ({"hidden_size": True}, "has True"),
        ({"num_hidden_layers": 49}, "the number of the bundle's tensors"),
        ({"hidden_dropout_prob": float("nan")}, "a number from 0 to 1"),
        ({"layer_norm_eps": float("inf")}, "a finite number"),
        ({"layer_norm_eps": 10**400}, "a huge integer"),
        ({"hidden_act": "someone/repo"}, "one of gelu"),
        ({"hidden_act": ["gelu"]}, "a list of 1"),
        ({"id2label": {"0": "a\x1b[31mb"}}, "printable labels"),
        ({"id2label": {str(n): "a" for n in range(41)}}, "at most 40"),
        ({"eos_token_id": list(range(65))}, "at most 64"),
        ({"is_decoder": 1}, "true or false"),
        ({"architectures": ["os.system"]}, "class names"),
        ({"model_type": "llama"}, "one of bert"),
    ],
)
def test_arguments_have_their_kind_and_range(change: dict[str, Any], said: str) -> None:
    bounds = Bounds(tensors=48, largest=40)
    honest = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 48, "hidden_act": "gelu", "model_type": "bert"}
    check_record(of_transformers("BertModel", **honest), bounds)
    with pytest.raises(AdapterError, match=said):
        check_record(of_transformers("BertModel", **honest | change), bounds)


def test_objects_inside_are_checked_like_those_outside() -> None:
    rope = {"rope_type": "default", "rope_theta": 1e4}
    check_record(of_transformers("LlamaModel", rope_parameters=rope), BOUNDS)
    check_record(of_transformers("CLIPModel", text_config={"hidden_size": 16, "_name_or_path": ""}), BOUNDS)
    for wrong in (
        of_transformers("LlamaModel", rope_parameters={**rope, "rope_type": "someone/repo"}),
        of_transformers("LlamaModel", rope_parameters={**rope, "_private": 1}),
        of_transformers("LlamaModel", rope_parameters=[1]),
        of_transformers("CLIPModel", text_config={"hidden_size": 41}),
        of_transformers("CLIPModel", text_config={"_name_or_path": "someone/repo"}),
        of_transformers("CLIPModel", text_config={"model_type": "vit"}),
        of_transformers("CLIPModel", text_config="someone/repo"),
        of_transformers("BertModel", hidden_size={"hidden_size": 16}),
        of_transformers("SwinModel", depths=[20, 20]),
    ):
        with pytest.raises(AdapterError, match="pass the model"):
            check_record(wrong, BOUNDS)


HOSTILE = st.one_of(
    st.sampled_from(["someone/repo", "../planted", "/etc/passwd", "hf-hub:a/b", "load", "AutoModel", "\x1b[2J", ""]),
    st.sampled_from([-1, 0, 1, 17, 2_000_000, 2**31, 2**63, 10**400, True, None, 0.5, 1e308, -1e308]),
    st.recursive(
        st.integers() | st.text(max_size=5), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
    ),
    st.just([0] * 100_000),
    st.just({"a": {"b": {"c": {"auto_map": {"AutoModel": "someone/repo--code.C"}}}}}),
    st.just({"model_type": "vit", "auto_map": {"AutoModel": "someone/repo--code.C"}}),
)
ADDED = (
    *("auto_map", "backbone", "checkpoint_path", "pretrained", "attn_implementation", "_attn_implementation", "dtype"),
    *("torch_dtype", "num_labels", "quantization_config", "backbone_config", "__class__", "name_or_path"),
)
NAMES = (
    *("AutoModel", "PreTrainedModel", "BertModel", "LlamaForCausalLM", "DetrModel", "TimmWrapperModel", "pipeline"),
    *("MambaModel", "RagModel", "VisionEncoderDecoderModel", "__init__", "hf-hub:a/b", "local-dir:/planted"),
)


@st.composite
def mutated(draw: st.DrawFn, honest: dict[str, Any]) -> dict[str, Any]:
    """An honest record with one to three changes: other values, other keys, another class, another library."""
    record = copy.deepcopy(honest)
    for _ in range(draw(st.integers(1, 3))):
        config = record["record"]["config"]
        how = draw(st.sampled_from(["value", "value", "added", "class", "adapter", "shape"]))
        if how == "value":
            config[draw(st.sampled_from(sorted(config)))] = draw(HOSTILE)
        elif how == "added":
            config[draw(st.sampled_from(ADDED))] = draw(HOSTILE)
        elif how == "class":
            record["record"]["class"] = draw(st.sampled_from(NAMES))
        elif how == "adapter":
            record["adapter"] = draw(st.sampled_from(["timm", "torchvision", "transformers", "os"]))
        else:
            record[draw(st.sampled_from(["dtype", "extra"]))] = draw(HOSTILE)
    return record


@settings(deadline=None, derandomize=True, max_examples=250, database=None)
@given(data=st.data(), trust=st.booleans())
def test_a_mutated_record_is_refused_or_builds_the_bundles_own_model(
    saved: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, trust: bool
) -> None:
    record = data.draw(mutated(record_in(saved)))
    folder = shutil.copytree(saved, tmp_path_factory.mktemp("mutated") / "bundle")
    put(folder, record)
    seen.clear()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    net, said = None, ""
    try:
        net = cocktail.from_pretrained(folder, trust_build_record=trust)
    except BundleError as error:
        said = str(error)
    assert said.isprintable()
    if net is not None:
        assert type(net.model).__name__ == "BertForSequenceClassification"
        assert torch.equal(net.model.classifier.weight, cocktail.from_pretrained(saved).model.classifier.weight)
    assert seen == []
    # KiB on Linux, bytes on macOS, where this is no bound. Libraries that a name imports take some themselves.
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert sys.platform != "linux" or grown < 300 * 1024
    shutil.rmtree(folder)


LISTED = (
    "BertForMaskedLM",
    "T5ForConditionalGeneration",
    "GPT2LMHeadModel",
    "LlamaForCausalLM",
    "MixtralModel",
    "CLIPModel",
)
LISTED += ("ViTForImageClassification", "SwinModel", "ConvNextForImageClassification", "ResNetModel", "AlbertModel")


@pytest.mark.parametrize("name", LISTED)
def test_an_honest_model_is_recorded_and_built_again(name: str) -> None:
    model = transformers_model(name)
    said, reason = best_record(model)
    assert reason is None
    again = rebuilt(said, bounds=Bounds.of(t.shape for t in model.state_dict().values()))
    assert type(again) is type(model)
    assert again.state_dict().keys() == model.state_dict().keys()


def test_what_a_checkpoint_carries_besides_is_left_out_of_the_record() -> None:
    model = transformers_model("BertForMaskedLM")
    model.config.task_specific_params = {"summarization": {"prefix": "summarize: "}}
    model.config.id2label = {0: "no", 1: "yes"}
    said, reason = best_record(model)
    assert reason is None
    assert "task_specific_params" not in said["record"]["config"]
    assert rebuilt(said, "meta").config.id2label == {0: "no", 1: "yes"}


def test_an_unlisted_class_loads_by_trust_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    import transformers

    sizes = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = transformers.PhiModel(transformers.PhiConfig(**sizes, intermediate_size=24)).eval()
    net = cocktail.sparsify(model, ["2:4"], (), {"input_ids": WORDS, "use_cache": False})
    with caplog.at_level(logging.INFO, logger="cocktailsdk"):
        net.save_pretrained(tmp_path / "bundle")
    assert "trust_build_record=True" in caplog.text
    with pytest.raises(BundleError, match=r"'PhiModel'.*from_pretrained\(bundle, trust_build_record=True\)"):
        cocktail.from_pretrained(tmp_path / "bundle")
    loaded = cocktail.from_pretrained(tmp_path / "bundle", trust_build_record=True)
    assert type(loaded.model) is transformers.PhiModel
    assert type(cocktail.CocktailNet.from_pretrained(tmp_path / "bundle", trust_build_record=True)) is type(loaded)


def test_another_packages_adapter_never_rebuilds(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import test_adapters

    from cocktailsdk import models as registry

    class Own(test_adapters.Own):
        name = "transformers"

        def records(self, model: nn.Module) -> list[dict[str, Any]]:
            raise AssertionError("another package's adapter was asked for a record")

        rebuild = records

    points = [test_adapters.Point("own", Own)]
    monkeypatch.setattr(registry, "entry_points", lambda group: points if group == registry.GROUP else [])
    registry.adapters.cache_clear()
    try:
        assert list(registry.adapters()) == ["transformers"]
        loaded = cocktail.from_pretrained(bundle)
        assert registry.record_of(loaded.model) is not None
    finally:
        monkeypatch.undo()
        registry.adapters.cache_clear()


def test_a_users_own_architecture_of_a_listed_name_is_not_called(monkeypatch: pytest.MonkeyPatch) -> None:
    import timm

    def mine(**_: Any) -> nn.Module:
        raise AssertionError("a function that is not timm's was called")

    monkeypatch.setitem(timm.models._registry._model_entrypoints, "test_resnet", mine)
    with pytest.raises(AdapterError, match="has no architecture"):
        rebuilt(of("timm", "test_resnet", num_classes=5), "meta")


@pytest.mark.parametrize(("found", "fits"), [("5.21.1", 0), ("5.22.0", 1), ("5.24.3", 1), ("5.25.0", 0), ("6.0", 0)])
def test_other_versions_are_refused_but_by_trust(
    found: str, fits: int, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (library("transformers").oldest, library("transformers").newest) == ("5.22", "5.24")
    monkeypatch.setattr(tables, "version", lambda name: found)
    if fits:
        check_version("transformers")
        return
    with pytest.raises(BundleError, match=f"5.22 to 5.24, and {found} is installed; pass the model"):
        cocktail.from_pretrained(bundle)
    cocktail.from_pretrained(bundle, trust_build_record=True)


def test_a_model_of_an_untested_version_is_still_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "version", lambda name: "9.0")
    said, reason = best_record(transformers_model("BertModel"))
    assert said["record"]["class"] == "BertModel"
    assert "9.0 is installed" in reason


@pytest.mark.parametrize(
    ("attempt", "said"),
    [
        (lambda path: __import__("socket").socket(), "socket"),
        (lambda path: __import__("subprocess").run(["true"], check=False), "subprocess.Popen"),
        (lambda path: __import__("pickle").loads(b"cos\nsystem\n."), "pickle.find_class"),
        (lambda path: input(), "builtins.input"),
        (lambda path: (path / "new").write_text("a"), "writing"),
        (lambda path: (path / "there").read_bytes(), "reading"),
    ],
)
def test_the_fence_stops_a_library_that_catches_the_error(tmp_path: Path, attempt: Any, said: str) -> None:
    (tmp_path / "there").touch()
    with pytest.raises(AdapterError, match=f"it tried {said}"), fenced(), suppress(Exception):
        attempt(tmp_path)
    assert not (tmp_path / "new").exists()
    assert (tmp_path / "there").read_bytes() == b""


def test_the_fence_is_around_one_thread_and_ends() -> None:
    read = []
    other = threading.Thread(target=lambda: read.append(Path(__file__).with_name("public_api.txt").read_text()))
    with fenced():
        other.start()
        other.join()
    assert len(read[0]) > 0
    assert Path(__file__).with_name("public_api.txt").read_text() == read[0]


def test_the_command_line_takes_the_flag_where_it_opens_a_bundle_without_a_model(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from cocktailsdk.cli.main import app

    for command in ("bench", "export"):
        helped = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200"})
        assert "--trust-build-record" in helped.output
    import transformers

    sizes = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = transformers.PhiModel(transformers.PhiConfig(**sizes, intermediate_size=24)).eval()
    net = cocktail.sparsify(model, ["2:4"], (), {"input_ids": WORDS, "use_cache": False})
    net.save_pretrained(tmp_path / "bundle")
    arguments = ["export", str(tmp_path / "bundle"), "2:4", str(tmp_path / "slim.safetensors")]
    refused = CliRunner().invoke(app, arguments, env={"COLUMNS": "400"})
    assert refused.exit_code != 0
    assert not (tmp_path / "slim.safetensors").exists()
    assert CliRunner().invoke(app, [*arguments, "--trust-build-record"]).exit_code == 0
    assert (tmp_path / "slim.safetensors").exists()
