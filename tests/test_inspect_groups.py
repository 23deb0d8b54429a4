"""What is told of groups, of what is kept, and the picture."""

from __future__ import annotations

import io
import json
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import torch
from rich.console import Console
from test_cli import in_a_process, run
from tiny import TinyNet
from torch import Tensor, nn

import cocktailsdk as cocktail
from cocktailsdk.errors import AdapterError, CocktailError
from cocktailsdk.inspection import Inspection
from cocktailsdk.models import build_model
from cocktailsdk.report.groups import groups_view
from cocktailsdk.utils.layer_names import folded, pattern_of

SVG = "{http://www.w3.org/2000/svg}"
X = torch.randn(1, 3, 6, 6, generator=torch.Generator().manual_seed(0))
ASSETS = Path(__file__).resolve().parent.parent / "docs" / "assets"


def told(found: Inspection, width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width, markup=False, emoji=False)
    console.print(groups_view(found, found.groups, "tiny"))
    assert isinstance(console.file, io.StringIO)
    return " ".join(console.file.getvalue().split())


@pytest.fixture(scope="module")
def resnet() -> Inspection:
    return cocktail.inspect(build_model("resnet18"), torch.zeros(1, 3, 64, 64))


@pytest.fixture(scope="module")
def bert() -> Inspection:
    from transformers import BertConfig, BertModel

    config = BertConfig(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64, vocab_size=90)
    return cocktail.inspect(BertModel(config))


class Cat(nn.Module):
    """Half of what ``reads`` reads may go; the other half is the model's output too."""

    def __init__(self) -> None:
        super().__init__()
        self.free = nn.Linear(4, 8)
        self.seen = nn.Linear(4, 8)
        self.reads = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        seen = self.seen(x)
        return self.reads(torch.cat([self.free(x), seen], 1)), seen


# Names


@pytest.mark.parametrize(
    ("names", "want"),
    [
        (["layer2.0.bn2", "layer2.1.bn2", "layer2.2.bn2", "fc"], ["layer2.{0..2}.bn2", "fc"]),
        (["a.0.x", "a.1.x"], ["a.{0,1}.x"]),
        (["a.0", "a.2", "a.3", "a.4", "a.9"], ["a.{0,2..4,9}"]),
        (["l.0.b.0", "l.0.b.1", "l.1.b.0", "l.1.b.1"], ["l.{0,1}.b.{0,1}"]),
        (["l.0.b.0", "l.0.b.1", "l.1.b.0"], ["l.0.b.{0,1}", "l.1.b.0"]),
        (["block1.conv1", "block2.conv1", "block2.conv2"], ["block{1,2}.conv1", "block2.conv2"]),
        (["conv1", "conv2", "conv1"], ["conv1", "conv2"]),
        ([], []),
        (["a#1.0.b", "a#1.1.b"], ["a#1.{0,1}.b"]),
    ],
)
def test_names_that_differ_in_a_number_become_one(names: list[str], want: list[str]) -> None:
    assert folded(names) == want


def test_names_of_repeated_blocks_have_one_pattern() -> None:
    assert pattern_of("layer1.0.conv1") == pattern_of("layer2.3.conv1") != pattern_of("layer1.0.conv2")


# Groups


def test_a_group_says_what_one_unit_takes_and_saves() -> None:
    model = TinyNet()
    found = cocktail.inspect(model, X)
    group = found.groups[1]
    assert {
        ("widen.weight", "rows", 1, 16, 16, 0),
        ("bn2.running_var", "entries", 1, 16, 16, 0),
        ("fc.weight", "columns", 1, 16, 16, 0),
    } <= {(s.tensor, s.kind, s.per_unit, s.positions, s.of, s.stay) for s in group.slices}
    net = cocktail.sparsify(model, "channel@0.5", example_inputs=(X,))
    removed = torch.zeros(net.coupling.n_units, dtype=torch.bool)
    removed[net.coupling.groups[1].start] = True
    assert group.params == net.coupling.params() - net.coupling.params(removed) > 0
    assert group.flops == net.coupling.flops() - net.coupling.flops(removed) > 0


def test_repeated_groups_are_told_once(resnet: Inspection) -> None:
    text = told(resnet)
    assert "layer2: residual stream: 128 channels made by 3 layers; removing one unit of layer2 removes" in text
    assert "1 row of layer2.{0,1}.conv2, layer2.0.downsample.0" in text
    assert (
        "1 entry of the norms layer2.{0,1}.bn2, layer2.0.downsample.1 (BatchNorm2d: weight, bias, statistics)" in text
    )
    assert "1 column of layer2.1.conv1, layer3.0.conv1, layer3.0.downsample.0" in text
    assert "layer2.{0,1}.conv1: 2 groups of 128 channels" in text


def test_heads_and_grouped_queries_are_called_so(bert: Inspection) -> None:
    kinds = {(g.kind, g.units, g.unit) for g in bert.groups}
    assert kinds == {("attention heads", 4, "an attention head of 8 channels"), ("channels", 64, "a channel")}
    text = told(bert)
    assert "encoder.layer.{0..2}.attention.self: attention heads: 3 groups of 4 units" in text
    assert "8 entries of the biases of encoder.layer.{0..2}.attention.self.query" in text


def test_attention_written_out_has_heads_too() -> None:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64, attn_implementation="eager"
    )
    found = cocktail.inspect(BertModel(config))
    assert ("attention heads", "an attention head of 8 channels") in {(g.kind, g.unit) for g in found.groups}


class Attention(nn.Module):
    """Attention written out; where ``tied``, each head has a number of its own, so that no head can go."""

    def __init__(self, heads: int, tied: bool) -> None:
        super().__init__()
        self.first, self.heads = nn.Linear(6, 12), heads
        self.q, self.k, self.v = (nn.Linear(12, 16) for _ in range(3))
        self.out = nn.Linear(16, 4)
        self.tied = tied

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        q, k, v = (layer(x).unflatten(-1, (self.heads, -1)).transpose(-3, -2) for layer in (self.q, self.k, self.v))
        weights = q @ k.transpose(-2, -1) / 2
        if self.tied:
            weights = weights + torch.arange(self.heads, device=x.device).view(-1, 1, 1)
        return self.out((weights.softmax(-1) @ v).transpose(-3, -2).flatten(-2))


@pytest.mark.parametrize(
    ("heads", "tied", "want"),
    [
        (4, False, {"an attention head of 4 channels"}),
        (4, True, {"the same channel of each of 4 heads"}),
        (1, False, set()),
    ],
)
def test_channels_of_every_head_are_called_so(heads: int, tied: bool, want: set[str]) -> None:
    found = cocktail.inspect(Attention(heads, tied).to("meta"), torch.ones(1, 5, 6))  # fixes do not matter here
    assert want <= {g.unit for g in found.groups}
    assert {g.unit for g in found.groups} - want <= {"a channel", f"{heads} channels that go together"}


def test_what_stays_of_a_weight_is_said() -> None:
    found = cocktail.inspect(Cat(), torch.ones(1, 4))
    (group,) = found.groups
    columns = next(s for s in group.slices if s.kind == "columns")
    assert (columns.positions, columns.of, columns.stay) == (8, 16, 8)
    assert "8 of the 16 columns of reads stay: an output of the model" in told(found)
    assert "8 of its 16 input channels stay" in str(found.why("reads"))
    assert "Others can, with the group free" in str(found.why("reads"))


def test_a_model_without_groups_says_why() -> None:
    found = cocktail.inspect(nn.Linear(4, 2), torch.ones(1, 4))
    assert "No channels of Linear can go: an output of the model" in told(found)


# Why


def test_why_tells_the_chain_to_the_cause(bert: Inspection) -> None:
    why = bert.why("encoder.layer.0.output.dense")
    stay = why.answers[0].stay
    assert stay is not None
    assert stay.reason == "an output of the model"
    assert [link.tensor for link in stay.chain][-1] == "encoder.layer.2.output.dense.weight"
    assert all(link.op == "add" for link in stay.chain)
    text = str(why)
    assert "none of its 32 output channels can go: they are added to those of encoder.layer.1.attention.output" in text
    assert "to those of encoder.layer.2.output.dense, which are an output of the model" in text
    assert "encoder.layer.{0..2}.attention.output.dense" in text
    assert "all 64 input channels can go, with the group encoder.layer.0.intermediate.dense" in text


def test_why_of_what_can_go(resnet: Inspection) -> None:
    assert "all 64 output channels can go, with the group stream (64 units; a unit is a channel)" in str(
        resnet.why("conv1")
    )
    assert "its 3 input channels stay" in str(resnet.why("conv1"))
    assert "first convolution" in str(resnet.why("conv1"))
    assert "none of its 1000 output channels can go: they are an output of the model" in str(resnet.why("fc"))
    assert "all 512 input channels can go, with the group layer4" in str(resnet.why("fc.weight"))
    norm = str(resnet.why("layer2.0.bn1"))
    assert norm.startswith("layer2.0.bn1 (weight, bias, running_mean, running_var): all 128 entries can go")


def test_why_of_containers_and_of_modules_without_parameters(resnet: Inspection, bert: Inspection) -> None:
    assert "go with the groups" in str(resnet.why("layer2"))
    assert "no parameters" in str(resnet.why("maxpool"))
    text = str(bert.why("encoder.layer.1"))
    assert "those of encoder.layer.1.attention.output.dense, encoder.layer.1.output.dense stay" in text
    assert "an output of the model" in text


def test_why_of_an_unknown_name_tells_the_nearest(resnet: Inspection) -> None:
    with pytest.raises(CocktailError, match=r"no module or parameter 'layer2.0.con1'; did you mean layer2.0.conv1"):
        resnet.why("layer2.0.con1")


def test_why_of_an_op_without_a_rule() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.special.bessel_j0(self.a(x)))

    assert "special_bessel_j0 in the model is an op without a rule" in str(
        cocktail.inspect(Net(), X[0, 0, :1, :4]).why("a")
    )


def test_why_of_what_the_user_excluded() -> None:
    net = cocktail.sparsify(TinyNet(), "channel@0.5", example_inputs=(X,), exclude_modules=["widen"])
    text = str(cocktail.inspect(net).why("widen"))
    assert "excluded by the user" in text
    assert "no single weights go (unstructured, N:M): excluded" in text
    assert "excluded" not in str(cocktail.inspect(net.model, X).why("widen"))


def test_why_of_a_model_that_cannot_be_followed() -> None:
    found = cocktail.inspect(nn.Linear(3, 3))
    assert "nothing of it can go" in str(found.why("weight"))


# The picture


@pytest.mark.parametrize("which", ["resnet", "bert"])
def test_the_picture_is_valid_and_always_the_same(which: str, request: pytest.FixtureRequest) -> None:
    found: Inspection = request.getfixturevalue(which)
    svg = found.to_svg("a <name> & more")
    assert svg == found.to_svg("a <name> & more")
    root = ET.fromstring(svg)
    assert root.tag == f"{SVG}svg"
    texts = [t.text for t in root.iter(f"{SVG}text")]
    assert "a <name> & more" in texts
    titles = "\n".join(t.text or "" for t in root.iter(f"{SVG}title"))
    assert "an output of the model" in titles
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    for element in root.iter():
        x, y = (float(element.attrib.get(a, 0)) for a in ("x", "y"))
        assert 0 <= x <= width
        assert 0 <= y <= height


def test_the_picture_has_every_layer_and_folds_repeated_blocks(resnet: Inspection, bert: Inspection) -> None:
    texts = [t.text for t in ET.fromstring(resnet.to_svg()).iter(f"{SVG}text")]
    for layer in resnet.layers:
        assert layer.module in texts or any("{" in (t or "") for t in texts)
    texts = [t.text for t in ET.fromstring(bert.to_svg()).iter(f"{SVG}text")]
    assert "encoder.layer.{0..2}.attention.self.query" in texts
    assert "×3" in texts
    assert "4 attention heads" in texts


def test_the_same_model_built_again_gives_the_same_bytes() -> None:
    first, second = (cocktail.inspect(Cat(), torch.ones(1, 4)).to_svg() for _ in range(2))
    assert first == second


def test_a_model_that_cannot_be_followed_is_drawn_grey() -> None:
    svg = cocktail.inspect(nn.Linear(3, 3)).to_svg()
    assert "its graph is not known" in svg
    ET.fromstring(svg)


# The command


NET = """
from torch import nn
def build():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.ReLU(),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))
"""


@pytest.fixture
def built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    (tmp_path / "explained_net.py").write_text(NET)
    monkeypatch.chdir(tmp_path)
    return ["inspect", "explained_net:build", "--input-size", "3,12,12"]


def test_the_command_explains_groups(built: list[str]) -> None:
    done = run(*built, "--groups")
    assert done.exit_code == 0, done.output
    assert "removing one unit of 0 removes" in done.stdout
    assert "and saves" in done.stdout
    assert "Layers (" not in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80
    one = run(*built, "--group", "3").stdout
    assert "1 of 2 channel groups" in one
    assert "unit of 3 removes" in one
    assert "unit of 0 removes" not in one
    assert "2 channel groups" in run(*built, "--group", "*").stdout
    wrong = run(*built, "--group", "nothing")
    assert wrong.exit_code == 1
    assert "--groups lists all" in wrong.stderr


def test_the_command_says_why(built: list[str]) -> None:
    done = run(*built, "--why", "7", "--why", "1")
    assert done.exit_code == 0, done.output
    assert "none of its 4 output channels can go" in done.stdout
    assert "1 (weight, bias, running_mean, running_var)" in done.stdout
    wrong = run(*built, "--why", "77")
    assert wrong.exit_code == 1
    assert "no module or parameter '77'" in wrong.stderr


def test_the_command_draws_and_gives_data(built: list[str], tmp_path: Path) -> None:
    done = run(*built, "--svg", "pictures/net.svg", "--json", "--why", "7", "--group", "3")
    assert done.exit_code == 0, done.output
    ET.parse(tmp_path / "pictures" / "net.svg")
    data = json.loads(done.stdout)
    (group,) = data["groups"]
    assert group["unit"] == "a channel"
    assert {s["kind"] for s in group["slices"]} == {"rows", "entries", "columns"}
    assert data["why"][0]["answers"][0]["stay"]["reason"] == "an output of the model"
    assert any(s["tensor"] == "7.weight" and s["makers"] == ["7.weight"] for s in data["stays"])


def test_without_values_the_same_is_found(built: list[str]) -> None:
    real, meta = (json.loads(run(*built, "--json", flag).stdout) for flag in ("--no-meta", "--meta"))
    assert real.pop("proven") is True
    assert meta.pop("proven") is False
    assert real == meta
    assert "built without values" in " ".join(run(*built, "--meta").stdout.split())


SHAPE = {
    "hidden_size": 4096,
    "num_hidden_layers": 2,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}


@pytest.mark.parametrize(
    ("config", "want"),
    [
        (
            {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 128256},
            {("grouped-query units", 8), ("channels", 14336), ("residual stream", 4096)},
        ),
        (
            {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "vocab_size": 32000},
            {("grouped-query units", 8), ("expert channels", 14336), ("residual stream", 4096)},
        ),
    ],
    ids=["llama", "mixtral"],
)
def test_large_widths_need_little_memory(config: dict[str, object], want: set[tuple[str, int]], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**SHAPE, **config, "tie_word_embeddings": False}))
    done = in_a_process("inspect", f"hf:{tmp_path}", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["params"] > 1e9
    assert found["proven"] is False  # no values were made: nothing of that size fits into a test
    assert {(g["kind"], g["units"]) for g in found["groups"]} == want
    units = {g["unit"] for g in found["groups"]}
    assert "4 query heads with the key and value head that they share (128 channels each)" in units


def test_a_configuration_file_is_a_model(tmp_path: Path) -> None:
    from transformers import BertConfig

    config = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=50)
    path = tmp_path / "config.json"
    config.to_json_file(path)
    assert type(build_model(f"hf:{path}")).__name__ == "BertModel"
    config.architectures = ["BertForMaskedLM"]
    config.to_json_file(path)
    assert type(build_model(f"hf:{path}")).__name__ == "BertForMaskedLM"
    config.architectures = ["NoSuchModel"]
    config.to_json_file(path)
    assert type(build_model(f"hf:{tmp_path}")).__name__ == "BertModel"
    with pytest.raises(AdapterError, match="no trained weights"):
        build_model(f"hf:{path}", pretrained=True)
    with pytest.raises(AdapterError, match="nowhere"):
        build_model(f"hf:{tmp_path}/nowhere.json")


def test_the_picture_in_the_documentation_is_up_to_date() -> None:
    """``cocktail-cli inspect resnet50 --svg docs/assets/coupling-resnet50.svg`` makes it."""
    found = cocktail.inspect(build_model("resnet50"), torch.zeros(1, 3, 64, 64))
    drawn, kept = (found.to_svg("resnet50"), (ASSETS / "coupling-resnet50.svg").read_text(encoding="utf-8"))
    # FLOPs in the tooltips are those of larger images.
    assert [t.text for t in ET.fromstring(drawn).iter(f"{SVG}text")] == [
        t.text for t in ET.fromstring(kept).iter(f"{SVG}text")
    ]
