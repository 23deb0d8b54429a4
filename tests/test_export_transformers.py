"""Models of transformers, which take and return mappings, as files of other runtimes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import cocktailsdk as cocktail

pytest.importorskip("onnxruntime", reason="the extra 'onnx' is not installed")
pytest.importorskip("onnxscript", reason="the extra 'onnx' is not installed")


@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
def test_a_transformer_that_takes_and_returns_mappings(suffix: str, tmp_path: Path) -> None:
    from transformers import BertConfig, BertForSequenceClassification

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=40, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48
        )
        model = BertForSequenceClassification(config).eval()
        kwargs = {
            "input_ids": torch.randint(1, 40, (2, 6)),
            "attention_mask": torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]]),
        }
    net = cocktail.sparsify(model, ["channel@0.5+2:4"], example_kwargs=kwargs)
    report = net.export("channel@0.5+2:4", tmp_path / f"bert{suffix}")
    assert report.inputs == ("input_ids", "attention_mask") and report.outputs == ("logits",)
    assert report.zeros.found == report.zeros.wanted > 0 and not report.zeros.missing
    given = {k: v[:1].repeat(3, 1) for k, v in kwargs.items()}
    with net.using("channel@0.5+2:4"), torch.no_grad():
        wanted = model(**given).logits
    if suffix == ".onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(str(tmp_path / "bert.onnx"), providers=["CPUExecutionProvider"])
        got = torch.from_numpy(session.run(["logits"], {k: v.numpy() for k, v in given.items()})[0])
    else:
        got = torch.export.load(tmp_path / "bert.pt2").module()(**given)["logits"]
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
