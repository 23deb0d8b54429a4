"""Slim models of transformers are written and read by their configuration, or refuse and say why."""

from __future__ import annotations

import ast
import copy
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from cocktail_adapters.transformers_slim import Folded
from torch import Tensor, nn

import cocktailsdk as cocktail
from cocktailsdk import models as registry
from cocktailsdk.errors import SlimError

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 34,
}
GROUPED = {**SMALL, "num_attention_heads": 8, "num_key_value_heads": 4, "bos_token_id": 1, "eos_token_id": 2}
VISION = {**SMALL, "image_size": 32, "patch_size": 8}
VISION.pop("vocab_size"), VISION.pop("max_position_embeddings")
WORDS = {"input_ids": torch.arange(6, 16).unsqueeze(0)}
PICTURE = {"pixel_values": torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))}


def make(kind: str) -> tuple[Any, dict[str, Any]]:
    """A small model of a type, and inputs."""
    torch.manual_seed(0)
    words, uncached = dict(WORDS), {**WORDS, "use_cache": False}
    if kind == "bert":
        return hf.BertModel(hf.BertConfig(**SMALL)).eval(), words
    if kind == "bert, no pooler":
        return hf.BertModel(hf.BertConfig(**SMALL), add_pooling_layer=False).eval(), words
    if kind == "bert, classifier":
        return hf.BertForSequenceClassification(hf.BertConfig(**SMALL)).eval(), words
    if kind == "roberta":
        return hf.RobertaModel(hf.RobertaConfig(**SMALL)).eval(), words
    if kind == "distilbert":
        config = hf.DistilBertConfig(vocab_size=64, dim=32, n_layers=2, n_heads=4, hidden_dim=48)
        return hf.DistilBertModel(config).eval(), words
    if kind == "gpt2":
        config = hf.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2)
        return hf.GPT2Model(config).eval(), uncached
    if kind == "llama":
        return hf.LlamaModel(hf.LlamaConfig(**GROUPED)).eval(), uncached
    if kind == "llama, tied":
        return hf.LlamaForCausalLM(hf.LlamaConfig(**GROUPED, tie_word_embeddings=True)).eval(), uncached
    if kind == "qwen2":
        return hf.Qwen2Model(hf.Qwen2Config(**GROUPED)).eval(), uncached
    if kind == "phi3":
        return hf.Phi3Model(hf.Phi3Config(**GROUPED, pad_token_id=0)).eval(), uncached
    if kind == "mixtral":
        model = hf.MixtralModel(hf.MixtralConfig(**GROUPED, num_local_experts=4))
    elif kind == "qwen2-moe":
        own = {"moe_intermediate_size": 24, "shared_expert_intermediate_size": 40, "num_experts": 4}
        model = hf.Qwen2MoeModel(hf.Qwen2MoeConfig(**GROUPED, **own))
    elif kind == "t5":
        config = hf.T5Config(vocab_size=64, d_model=32, num_layers=2, num_heads=4, d_kv=8, d_ff=48)
        return hf.T5Model(config).eval(), {**uncached, "decoder_input_ids": torch.arange(6, 12).unsqueeze(0)}
    elif kind == "clip":
        config = hf.CLIPConfig(
            text_config=SMALL, vision_config={**VISION, "intermediate_size": 64, "hidden_size": 48}, projection_dim=16
        )
        return hf.CLIPModel(config).eval(), {**words, **PICTURE}
    elif kind == "vit":
        return hf.ViTModel(hf.ViTConfig(**VISION)).eval(), dict(PICTURE)
    elif kind == "vit, classifier":
        return hf.ViTForImageClassification(hf.ViTConfig(**VISION)).eval(), dict(PICTURE)
    elif kind == "resnet":
        config = hf.ResNetConfig(embedding_size=16, hidden_sizes=[16, 32, 48, 64], depths=[1, 1, 1, 1])
        return hf.ResNetForImageClassification(config).eval(), dict(PICTURE)
    else:
        raise ValueError(kind)
    model.set_experts_implementation("batched_mm")  # the default one has no float64 kernel
    return model.eval(), uncached


def slim(kind: str, **options: Any) -> tuple[Any, Any, dict[str, Any]]:
    """A small model, the same slim, and inputs; the model's configuration is as it was."""
    model, inputs = make(kind)
    before = copy.deepcopy(vars(model.config)), model.config.to_json_string()
    made = cocktail.slim(model, example_kwargs=inputs, **{"ratio": 0.5, "round_to": 1, **options})
    assert (vars(model.config), model.config.to_json_string()) == before
    assert made.config is not model.config
    return model, made, inputs


def output(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return model(**inputs)[0]


def read_back(model: Any, path: Path, **options: Any) -> Any:
    """What from_pretrained makes of what save_pretrained wrote; everything in the files is used, nothing missing."""
    model.save_pretrained(path)
    read, found = type(model).from_pretrained(path, output_loading_info=True, **options)
    assert not any(found.values()), found
    if getattr(model.config, "_experts_implementation", None) == "batched_mm":
        read.set_experts_implementation("batched_mm")
    return read.eval()


def config_of(message: str) -> list[str]:
    """The exclude_modules that a refusal advises."""
    return ast.literal_eval(re.findall(r"exclude_modules=(\[.*?\])", message)[-1])


@pytest.mark.parametrize(
    ("kind", "exclude", "says"),
    [
        ("bert", ["query", "key", "value"], {"intermediate_size": 24}),
        ("roberta", ["query", "key", "value"], {"intermediate_size": 24}),
        ("distilbert", ["q_lin", "k_lin", "v_lin"], {"hidden_dim": 24}),
        ("gpt2", ["c_attn"], {"n_inner": 64}),
        ("llama", None, {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 24, "head_dim": 4}),
        ("qwen2", None, {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 24, "head_dim": 4}),
        ("phi3", None, {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 24, "head_dim": 4}),
        ("mixtral", None, {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 24}),
        ("qwen2-moe", None, {"num_key_value_heads": 2, "moe_intermediate_size": 12, "num_experts": 4}),
        ("t5", ["q", "k", "v"], {"d_ff": 24, "num_heads": 4}),
        ("vit", None, {"num_attention_heads": 2, "intermediate_size": 24, "head_dim": 8}),
        ("resnet", None, {"embedding_size": 8, "hidden_sizes": [8, 16, 24, 32]}),
    ],
)
def test_what_a_configuration_can_say_is_written_and_read(
    kind: str, exclude: list[str] | None, says: dict[str, Any], tmp_path: Path
) -> None:
    model, made, inputs = slim(kind, exclude_modules=exclude)
    assert {name: getattr(made.config, name) for name in says} == says
    assert made.num_parameters() < model.num_parameters()
    read = read_back(made, tmp_path)
    assert type(read) is type(model) is type(made)
    assert {name: getattr(read.config, name) for name in says} == says
    assert all(torch.equal(t, read.state_dict()[name]) for name, t in made.state_dict().items())
    assert torch.allclose(output(made, inputs), output(read, inputs), rtol=0, atol=1e-6)


def test_configurations_inside_others_are_written_too(tmp_path: Path) -> None:
    _, made, inputs = slim("clip", exclude_modules=["q_proj", "k_proj", "v_proj"])
    assert made.config.text_config.intermediate_size == 24
    assert made.config.vision_config.intermediate_size == 32
    assert made.text_model.config is made.config.text_config
    assert torch.allclose(output(made, inputs), output(read_back(made, tmp_path), inputs), rtol=0, atol=1e-6)


def test_all_modules_share_the_new_configuration() -> None:
    _, made, _ = slim("llama")
    assert {id(m.config) for m in made.modules() if hasattr(m, "config")} == {id(made.config)}
    assert made.layers[0].mlp.intermediate_size == 24


def test_flags_that_the_model_was_built_with_are_found(tmp_path: Path) -> None:
    _, made, inputs = slim("bert, no pooler", exclude_modules=["query", "key", "value"])
    read = read_back(made, tmp_path, add_pooling_layer=False)
    assert torch.equal(output(made, inputs), output(read, inputs))


class TestANarrowerResidualStream:
    """Root mean squares over fewer channels are the class's own norm with a larger weight and eps."""

    def test_is_written_as_the_class_has_it(self, tmp_path: Path) -> None:
        model, made, inputs = slim("llama, tied")
        assert made.config.hidden_size == 16
        assert made.config.rms_norm_eps == model.config.rms_norm_eps * 2
        read = read_back(made, tmp_path)
        assert type(read.model.norm) is type(model.model.norm)
        assert read.lm_head.weight is read.model.embed_tokens.weight
        double = output(made.double(), inputs), output(read.double(), inputs)
        assert torch.allclose(*double, rtol=0, atol=1e-6)  # the class itself takes the root in float32
        assert (
            torch.equal(read.generate(WORDS["input_ids"], max_new_tokens=4, do_sample=False).shape, (1, 14))
            if (False)
            else read.generate(WORDS["input_ids"], max_new_tokens=4, min_new_tokens=4).shape == (1, 14)
        )

    def test_the_model_in_memory_keeps_its_values(self) -> None:
        model, made, _ = slim("llama, tied")
        assert set(made.model.norm.weight.tolist()) <= set(model.model.norm.weight.tolist())

    def test_is_written_as_it_is_after_training_by_copies_too(self, tmp_path: Path) -> None:
        _, made, inputs = slim("llama, tied")
        twin = copy.deepcopy(made)
        twin(**inputs, labels=WORDS["input_ids"]).loss.backward()
        torch.optim.SGD(twin.parameters(), lr=0.5).step()
        assert not torch.equal(twin.model.norm.weight, made.model.norm.weight)
        assert torch.allclose(output(twin, inputs), output(read_back(twin, tmp_path / "a"), inputs), atol=1e-5)
        assert torch.allclose(output(made, inputs), output(read_back(made, tmp_path / "b"), inputs), atol=1e-5)
        state = {name: t.clone() for name, t in twin.state_dict().items()}
        made.save_pretrained(tmp_path / "c", state_dict=state)
        read = type(made).from_pretrained(tmp_path / "c").eval()
        assert torch.allclose(output(twin, inputs), output(read, inputs), atol=1e-5)

    def test_a_part_of_it_is_written_alike(self, tmp_path: Path) -> None:
        _, made, inputs = slim("llama, tied")
        assert torch.allclose(output(made.model, inputs), output(read_back(made.model, tmp_path), inputs), atol=1e-5)

    def test_pickles(self) -> None:
        _, made, _ = slim("llama, tied")
        owner = nn.Linear(1, 1)
        owner.saver = Folded(owner, made.save_pretrained.folds)
        again = pickle.loads(pickle.dumps(owner))
        assert again.saver.folds == made.save_pretrained.folds
        assert again.saver.__getstate__()["model"] is again


class TestRefusals:
    def test_name_heads_that_the_class_derives_from_its_width(self, tmp_path: Path) -> None:
        _, made, inputs = slim("bert")
        with pytest.raises(SlimError, match=r"layer\.0\.attention.* keeps 16 of 32 rows.*intermediate_size=24") as e:
            made.save_pretrained(tmp_path / "x")
        assert not (tmp_path / "x").exists()
        assert "net.save_pretrained" in str(e.value)
        advised = config_of(str(e.value))
        assert advised == ["query", "key", "value"]
        _, made, _ = slim("bert", exclude_modules=advised)
        assert torch.equal(output(made, inputs), output(read_back(made, tmp_path), inputs))

    @pytest.mark.parametrize("kind", ["bert, classifier", "vit, classifier"])
    def test_name_norms_that_count_what_is_gone(self, kind: str, tmp_path: Path) -> None:
        _, made, inputs = slim(kind)
        with pytest.raises(SlimError, match=r"normalises over the 16 channels that are left of 32") as e:
            made.save_pretrained(tmp_path)
        whole = config_of(str(e.value))
        for _ in range(3):  # whoever follows the advice arrives
            _, made, _ = slim(kind, exclude_modules=whole)
            try:
                read = read_back(made, tmp_path)
                break
            except SlimError as e:
                whole = [*whole, *config_of(str(e))]
        assert made.config.intermediate_size == 24
        assert torch.allclose(output(made, inputs), output(read, inputs), atol=1e-6)

    def test_name_layers_of_different_widths(self, tmp_path: Path) -> None:
        _, made, _ = slim("llama", ratio={"layers.0.mlp": 0.5, "layers.1.mlp": 0.25})
        with pytest.raises(SlimError, match=r"layers\.0\.mlp.* keeps 24 of 48 rows, layers\.1\.mlp.* 36.*one ratio"):
            made.save_pretrained(tmp_path)
        assert made.config.intermediate_size == 48

    def test_name_a_layer_that_is_whole(self, tmp_path: Path) -> None:
        _, made, _ = slim("vit", exclude_modules=["layers.1"])
        with pytest.raises(SlimError, match=r"layers\.0\..* keeps 16 of 32 rows, layers\.1\..* 32"):
            made.save_pretrained(tmp_path)

    def test_hold_for_parts_copies_and_pickles_and_disturb_nothing_else(self, tmp_path: Path) -> None:
        model, made, inputs = slim("bert, classifier")
        for refusing in (made, made.bert, copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
            with pytest.raises(SlimError, match="no BertConfig describes it"):
                refusing.save_pretrained(tmp_path / "x")
        assert made.state_dict().keys() == model.state_dict().keys()
        again = copy.deepcopy(made)
        again.load_state_dict(made.state_dict())
        again.train()(**inputs, labels=torch.tensor([1])).loss.backward()
        assert all(p.grad is not None for p in again.parameters())

    def test_end_with_the_next_slimming(self, tmp_path: Path) -> None:
        _, made, inputs = slim("llama", ratio={"layers.0.mlp": 0.5, "layers.1.mlp": 0.25})
        with pytest.raises(SlimError, match="keeps 24 of 48"):
            made.save_pretrained(tmp_path)
        even = cocktail.slim(made, example_kwargs=inputs, ratio={"layers.1.mlp": 1 / 3}, round_to=1)
        assert even.config.intermediate_size == 24
        assert torch.equal(output(even, inputs), output(read_back(even, tmp_path), inputs))


def test_shapes_alone_prove_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cocktail_adapters.transformers_search import Search

    # Half as many channels in each head have the shapes of half as many heads.
    narrow = {("head_dim",): 2, ("intermediate_size",): 24}
    monkeypatch.setattr(Search, "solutions", lambda self: iter([narrow]))
    _, made, _ = slim("llama")
    with pytest.raises(
        SlimError, match=r"head_dim=2.* the shapes are the same, but LlamaModel computes something else"
    ):
        made.save_pretrained(tmp_path)


def test_a_model_that_is_not_as_its_configuration_says_is_refused(tmp_path: Path) -> None:
    model, inputs = make("llama")
    model.layers[0].mlp.act_fn = nn.Tanh()
    made = cocktail.slim(model, example_kwargs=inputs, round_to=1)
    with pytest.raises(SlimError, match="computes something else"):
        made.save_pretrained(tmp_path)
    model, inputs = make("llama")
    model.layers[1].extra = nn.Linear(2, 2)
    made = cocktail.slim(model, example_kwargs=inputs, round_to=1)
    with pytest.raises(SlimError, match="'layers.1.extra.bias' is in one"):
        made.save_pretrained(tmp_path)


def test_low_precision_stays(tmp_path: Path) -> None:
    model, _ = make("vit")
    inputs = {"pixel_values": PICTURE["pixel_values"].bfloat16()}
    made = cocktail.slim(model.bfloat16(), example_kwargs=inputs)
    read = read_back(made, tmp_path)
    assert read.dtype == torch.bfloat16
    assert torch.equal(output(made, inputs), output(read, inputs))


def test_models_inside_other_modules(tmp_path: Path) -> None:
    class Mine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = make("vit")[0]
            self.head = nn.Linear(32, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(x).last_hidden_state[:, 0])

    made = cocktail.slim(Mine(), (PICTURE["pixel_values"],), exclude_modules=["body.embeddings"], round_to=1)
    assert made.body.config.num_attention_heads == 2
    read = read_back(made.body, tmp_path)
    assert torch.allclose(output(made.body, dict(PICTURE)), output(read, dict(PICTURE)), atol=1e-6)


def test_random_numbers_are_left_undrawn() -> None:
    model, inputs = make("llama")
    made = cocktail.slim(model, example_kwargs=inputs)
    state = torch.get_rng_state()
    registry.after_slim(made, ((), inputs))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("kind", "described"), [("llama", True), ("t5", True), ("bert", False)])
def test_the_bundle_holds_what_no_configuration_says(kind: str, described: bool, tmp_path: Path) -> None:
    model, inputs = make(kind)
    net = cocktail.sparsify(model, ["channel@0.5", "2:4"], example_kwargs=inputs)
    net.save_pretrained(tmp_path / "bundle")
    torch.manual_seed(1)
    again = cocktail.from_pretrained(tmp_path / "bundle", type(model)(copy.deepcopy(model.config)).eval())
    made = again.slim("channel@0.5")
    assert torch.equal(output(made, inputs), output(net.slim("channel@0.5"), inputs))
    if described:
        assert torch.equal(output(made, inputs), output(read_back(made, tmp_path / "slim"), inputs))
    else:
        with pytest.raises(SlimError, match="net.save_pretrained"):
            made.save_pretrained(tmp_path / "slim")


def test_other_backends_are_described_too(tmp_path: Path) -> None:
    model, inputs = make("resnet")
    made = cocktail.slim(model, example_kwargs=inputs, backend="torch-pruning", ratio=0.5)
    read = read_back(made, tmp_path)
    assert read.config.hidden_sizes == [8, 16, 24, 32]
    assert torch.allclose(output(made, inputs), output(read, inputs), atol=1e-6)


class Watching:
    """An adapter that wants to see slim models."""

    name = "watching"
    seen: list[nn.Module]

    def after_slim(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        with torch.no_grad():
            model(*args, **kwargs)
        self.seen.append(model)
        if len(self.seen) > 1:
            raise RuntimeError("no such luck")


def test_any_adapter_may_look_after_slim_models(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    watching = Watching()
    watching.seen = []
    monkeypatch.setattr(registry, "adapters", lambda: {"watching": watching, "another": object()})
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    assert cocktail.slim(model, (torch.ones(1, 4),)) is watching.seen[0]
    net = cocktail.sparsify(model, ["channel@0.5"], (torch.ones(1, 4),))
    assert net.slim("channel@0.5") is watching.seen[1]
    assert "no such luck" in caplog.text


def test_layers_keep_their_numbers_whatever_sizes_these_equal() -> None:
    config = hf.LlamaConfig(**{**GROUPED, "num_hidden_layers": 6}, tie_word_embeddings=True)
    model = hf.LlamaForCausalLM(config).eval()  # layer 4 of a model with 4 heads of keys and values
    net = cocktail.sparsify(model, ["channel@0.4"])
    small = net.slim("channel@0.4").eval()
    assert [layer.self_attn.layer_idx for layer in small.model.layers] == list(range(6))
    prompt = torch.tensor([[1, 9, 30, 7]])
    with net.using("channel@0.4"), torch.no_grad():
        masked = net(input_ids=prompt, use_cache=True).logits
        longer = net.generate(prompt, max_new_tokens=8, do_sample=False)
    torch.testing.assert_close(small(input_ids=prompt, use_cache=True).logits.detach(), masked, rtol=1e-4, atol=1e-4)
    assert torch.equal(small.generate(prompt, max_new_tokens=8, do_sample=False), longer)
