"""Bundles that say how their model is built: loaded without one given, and never with another."""

from __future__ import annotations

import pytest
import torch
from test_bundle_damage import rewrite
from tiny import TinyNet

import cocktailsdk as cocktail
from cocktailsdk import BundleError
from cocktailsdk.models import rebuilt, record_of


def bert(**options):
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    limits = {"vocab_size": 40, "max_position_embeddings": 20, "num_labels": 3}
    return BertForSequenceClassification(BertConfig(**sizes, **limits, **options)).eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    net = cocktail.sparsify(bert(), ["unstructured@0.5", "channel@0.5"], (torch.arange(12).view(1, 12),))
    path = tmp_path_factory.mktemp("saved") / "bundle"
    net.save_pretrained(path)
    return net, path


@pytest.fixture
def bundle(saved, tmp_path):
    saved[0].save_pretrained(tmp_path / "bundle")
    return tmp_path / "bundle"


def test_a_bundle_of_a_librarys_model_is_loaded_without_one(saved):
    net, path = saved
    state = torch.random.get_rng_state()
    loaded = cocktail.from_pretrained(path)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert type(loaded.model) is type(net.model)
    x = torch.arange(12).view(1, 12)
    for name in net.names:
        with net.using(name), loaded.using(name), torch.no_grad():
            assert torch.equal(net.model(x).logits, loaded.model.eval()(x).logits)


@pytest.mark.parametrize(
    "make",
    [
        lambda timm, _: timm.create_model("resnet10t", num_classes=3, in_chans=1),
        lambda timm, _: timm.create_model("resnet10t").bfloat16(),
        lambda _, torchvision: torchvision.models.squeezenet1_1(),
        lambda _, torchvision: torchvision.models.shufflenet_v2_x0_5(num_classes=7),
    ],
)
def test_models_of_libraries_are_built_again(make):
    import timm
    import torchvision

    model = make(timm, torchvision)
    again = rebuilt(record_of(model))
    assert repr(again) == repr(model)
    assert [(n, t.shape, t.dtype) for n, t in again.state_dict().items()] == [
        (n, t.shape, t.dtype) for n, t in model.state_dict().items()
    ]


def test_what_would_be_built_otherwise_is_not_recorded():
    import timm

    changed = timm.create_model("resnet10t")
    changed.act1 = torch.nn.GELU()
    assert record_of(changed) is None
    assert record_of(TinyNet()) is None
    assert record_of(timm.create_model("resnet10t")) is not None


def test_paths_and_other_peoples_code_are_not_recorded():
    model = bert()
    model.config._name_or_path = "/home/me/secret"
    model.config.auto_map = {"AutoModel": "evil.Model"}
    assert "secret" not in str(record_of(model))
    assert "evil" not in str(record_of(model))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda b: b.update(adapter="nobody"), "no adapter 'nobody'"),
        (lambda b: b["record"].update({"class": "AutoModel"}), "no model class 'AutoModel'"),
        (lambda b: b["record"].update({"class": "logging"}), "no model class 'logging'"),
        (lambda b: b["record"]["config"].update(num_hidden_layers=10**9), "number of the bundle's tensors"),
        (lambda b: b["record"]["config"].update(hidden_size=1 << 40), "the bundle's largest dimension"),
        (lambda b: b["record"]["config"].update(num_labels=4), "made from another model"),
        (lambda b: b["record"]["config"].update(num_hidden_layers="many"), "has 'many' for"),
        (lambda b: b.update(dtype="float16"), "other tensors"),
        (lambda b: b.update(dtype="load"), "dtype is 'load'"),
        (lambda b: b.update(record=[]), "not an object"),
        (lambda b: b.update(command="rm -rf /"), "has 'command'"),
    ],
)
def test_a_record_that_does_not_build_the_bundles_model_is_refused(bundle, change, said):
    rewrite(bundle, lambda meta: change(meta["build"]))
    with pytest.raises(BundleError, match=said):
        cocktail.from_pretrained(bundle)


def test_a_given_model_needs_no_record(bundle):
    rewrite(bundle, lambda meta: meta.update(build=None))
    assert cocktail.from_pretrained(bundle, bert()).names == ["dense", "unstructured@0.5", "channel@0.5"]
    with pytest.raises(BundleError, match="does not say how its BertForSequenceClassification is built"):
        cocktail.from_pretrained(bundle)
