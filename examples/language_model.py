"""Co-train a small language model at 24 sparsities, and measure the perplexity of each.

    python examples/language_model.py --model FOLDER [--data FILE] [--out FOLDER] [--steps N] [--seed N]

FOLDER holds a causal language model of transformers and its tokenizer; without --model it is `llama_stories260k` in the
folder that the variable COCKTAIL_DATA names: a Llama of 260,032 parameters that tells children's stories.

--data is a text file of stories, each ended by a line `<|endoftext|>`. Without it the stories are the model's own,
sampled once at temperature 1. No network can then expect a lower perplexity than the dense one as it was given, and
what a sparse network loses is its divergence from that.

Ctrl-C saves, and the same command resumes. The folder then holds the bundle and report.json.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import math
import os
import shlex
import struct
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

import cocktailsdk as cocktail
from cocktailsdk.bundle import bundle_bytes
from cocktailsdk.errors import SlimError
from cocktailsdk.report.live import run_view_for
from cocktailsdk.report.recorded import recorded
from cocktailsdk.report.run import RunReport, dense_bytes, network_rows, versions
from cocktailsdk.report.tables import networks_table, size_line
from cocktailsdk.training.events import Event
from cocktailsdk.training.schedules import cosine

IGNORED = -100  # the label of padding, in transformers' losses
SHOWN = ("dense", "unstructured@0.488", "channel@0.271")
SLIM = "channel@0.344"


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    torch.manual_seed(options.seed)
    console = Console(soft_wrap=not sys.stdout.isatty())
    model = AutoModelForCausalLM.from_pretrained(options.model, local_files_only=True).eval()
    tokens = Tokens(options.model)
    split = three_parts(stories(model, tokens, options, console))
    loaders = [
        DataLoader(Stories(part), options.batch, shuffle=i == 0, generator=torch.Generator().manual_seed(options.seed))
        for i, part in enumerate(split)
    ]
    console.print(f"stories: {len(split[0])} to train on, {len(split[1])} held out, {len(split[2])} to test on")

    net = cocktail.sparsify(model, ["unstructured", "n:m", "channel"])  # inputs are made by transformers' adapter
    views: list[Callable[[Event], None]] = []
    trainer = cocktail.CoTrainer(
        net,
        loaders[0],  # batches have labels, so the model computes its own loss
        val_loader=loaders[1],
        metric=token_loss,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=options.rate, weight_decay=0.0),
        schedule=cosine(warmup=0.05),
        start="pretrained",  # all networks start from the model as it was given, which teaches them
        recipe=options.recipe,
        batches=cocktail.BatchSettings(steps_per_epoch=max(1, options.steps // 10)),
        total_steps=options.steps,
        # there is no batch norm, and no classifier head to refit
        evaluation=cocktail.EvaluationSettings(metric_mode="min", recalibration_batches=1),
        out_dir=options.out,
        seed=options.seed,
        callbacks=[lambda event: [view(event) for view in views]],
        output=cocktail.OutputSettings(config={"stories": fingerprint(split)}),
    )
    given = math.exp(trainer.evaluate(loaders[2], ["dense"])["dense"])
    with run_view_for(
        console, f"{options.model.name} · {len(net.names)} networks", [net.subnet(n) for n in net.names]
    ) as view:
        views.append(view)
        trainer.fit()
        view.note("measuring every network on the test stories")
        test = {name: math.exp(loss) for name, loss in trainer.evaluate(loaders[2]).items()}
    net.save_pretrained(options.out / "bundle")
    report = RunReport(
        networks=network_rows(net.subnets(), test, {name: math.exp(loss) for name, loss in net.metrics.items()}),
        bundle_bytes=bundle_bytes(options.out / "bundle"),
        dense_bytes=dense_bytes(net.model),
        seconds=trainer.history.seconds,
        metric_name="perplexity",
        preset="language_model",
        model=options.model.name,
        seed=options.seed,
        alphas=tuple(trainer.history.alphas),
        fingerprint=trainer.fingerprint,
        environment={**versions(), "command": shlex.join(["python", *sys.argv]), "dense as given": f"{given:.4f}"},
        **recorded(net, trainer),
    )
    report.write(options.out)
    console.print(networks_table(report.networks, "perplexity"))
    console.print(f"\ndense as given: {given:.4f}; {size_line(report)}")
    for name in SHOWN:
        with net.using(name):
            story = sample(net.model, tokens.bos, 1, options.length, options.seed)[0]
        console.print(f"\n[bold]{name}[/bold]: {tokens.decode(story)}", highlight=False)
    slim_check(net, SLIM, split[2][:2].clamp(min=0), options.out / "slim", console)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of the model and its tokenizer")
    parser.add_argument("--data", type=Path, help="text file of stories; default: sampled from the model")
    parser.add_argument("--out", type=Path, default=Path("runs/language_model"), help="the run's folder")
    parser.add_argument("--steps", type=int, default=2400, help="optimizer steps in all")
    parser.add_argument("--recipe", help="what the run does; by default the recipe for trained weights")
    parser.add_argument("--stories", type=int, default=3072, help="how many stories are sampled")
    parser.add_argument("--length", type=int, default=128, help="tokens of a story, at most")
    parser.add_argument("--batch", type=int, default=8, help="stories in a batch")
    parser.add_argument("--rate", type=float, default=3e-3, help="AdamW's learning rate")
    parser.add_argument("--seed", type=int, default=0, help="of sampling and of training")
    options = parser.parse_args(arguments)
    for name, value in vars(options).items():
        if isinstance(value, int | float) and name != "seed" and not isinstance(value, bool) and not value > 0:
            parser.error(f"--{name.replace('_', '-')} must be above 0, not {value}")
    if options.model is None:
        if "COCKTAIL_DATA" not in os.environ:
            parser.error("give --model FOLDER, or let COCKTAIL_DATA name the folder that holds llama_stories260k/")
        options.model = Path(os.environ["COCKTAIL_DATA"]) / "llama_stories260k"
    if not (options.model / "config.json").is_file():
        parser.error(
            f"{options.model} holds no config.json: give the folder of a causal language model of transformers"
        )
    if options.data is not None and not options.data.is_file():
        parser.error(f"{options.data} is no text file")
    return options


def token_loss(output: Any, labels: Tensor) -> Tensor:
    """The loss of every token that counts; exp of their mean is the perplexity."""
    labels = labels[:, 1:]
    loss = F.cross_entropy(
        output.logits[:, :-1].transpose(1, 2).float(), labels, reduction="none", ignore_index=IGNORED
    )
    return loss[labels != IGNORED]


# ------------------------------------------------------------------------------------------------ the stories


class Stories(Dataset[dict[str, Tensor]]):
    """Stories as rows of tokens, filled up with IGNORED: on the right, so that causal attention needs no mask."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"input_ids": self.rows[i].clamp(min=0), "labels": self.rows[i]}


def three_parts(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Training, held-out and test stories: at most 32 and 128 of them are kept apart."""
    held, test = min(32, len(rows) // 8), min(128, len(rows) // 8)
    return rows[held + test :], rows[:held], rows[held : held + test]


def stories(model: nn.Module, tokens: Tokens, options: argparse.Namespace, console: Console) -> Tensor:
    """``(stories, length)`` tokens: read from --data, or sampled and kept in the run's folder."""
    if options.data is not None:
        texts = options.data.read_text(encoding="utf-8").split("<|endoftext|>")
        ids = [[tokens.bos, *tokens.encode(text.strip()), tokens.bos] for text in texts if text.strip()]
        return torch.nn.utils.rnn.pad_sequence([torch.tensor(row[: options.length]) for row in ids], True, IGNORED)
    wanted = {"stories": options.stories, "length": options.length, "seed": options.seed, "model": str(options.model)}
    path = options.out / "stories.pt"
    if path.is_file() and (kept := torch.load(path, weights_only=True))["wanted"] == wanted:
        return kept["rows"]
    console.print(f"sampling {options.stories} stories from {options.model.name}")
    parts = [
        sample(model, tokens.bos, min(256, options.stories - start), options.length, 1_000_003 * options.seed + start)
        for start in range(0, options.stories, 256)
    ]
    options.out.mkdir(parents=True, exist_ok=True)
    torch.save({"wanted": wanted, "rows": torch.cat(parts)}, path)
    return torch.cat(parts)


@torch.no_grad()
def sample(model: nn.Module, bos: int, count: int, length: int, seed: int) -> Tensor:
    """Stories from a model as it stands, at temperature 1: ``(count, length)``, IGNORED after their ends."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        first = torch.full((count, 1), bos)
        rows = model.generate(
            first,
            attention_mask=torch.ones_like(first),
            max_length=length,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            eos_token_id=bos,  # this model ends a story as it begins the next
            pad_token_id=0,
        )
    ends = (rows[:, 1:] == bos).long()
    rows[:, 1:][ends.cumsum(1) > ends] = IGNORED  # the end itself is a token to predict
    return F.pad(rows, (0, length - rows.shape[1]), value=IGNORED)


def fingerprint(parts: tuple[Tensor, ...]) -> str:
    """So that a run never goes on with other stories."""
    return hashlib.sha256(b"".join(part.numpy().tobytes() for part in parts)).hexdigest()


class Tokens:
    """A folder's tokenizer: that of transformers, or llama2.c's `tok*.bin`; without either, tokens are numbers."""

    def __init__(self, folder: Path) -> None:
        self._auto = AutoTokenizer.from_pretrained(folder) if (folder / "tokenizer.json").is_file() else None
        self._pieces: list[bytes] = []
        self._scores: list[float] = []
        for path in sorted(folder.glob("tok*.bin"))[:1]:
            data, at = path.read_bytes(), 4
            while at < len(data):
                score, size = struct.unpack_from("<fi", data, at)
                self._pieces.append(data[at + 8 : at + 8 + size])
                self._scores.append(score)
                at += 8 + size
        bos = None if self._auto is None else self._auto.bos_token_id
        self.bos = 1 if bos is None else int(bos)

    def decode(self, row: Tensor) -> str:
        """The text of a story."""
        ids = [int(i) for i in row[1:] if int(i) not in (IGNORED, self.bos)]
        if self._auto is not None:
            return str(self._auto.decode(ids))
        if not self._pieces:
            return " ".join(map(str, ids))
        pieces = [self._pieces[i] for i in ids]
        raw = b"".join(bytes([int(p[3:5], 16)]) if p.startswith(b"<0x") and len(p) == 6 else p for p in pieces)
        return raw.decode("utf-8", errors="replace").strip()

    def encode(self, text: str) -> list[int]:
        """The tokens of a text: pairs are joined as long as a better-known piece comes of it."""
        if self._auto is not None:
            return list(self._auto.encode(text, add_special_tokens=False))
        if not self._pieces:
            return [int(i) for i in text.split()]
        known = {piece: i for i, piece in enumerate(self._pieces)}
        ids: list[int] = []
        for letter in " " + text:
            raw = letter.encode()
            ids += [known[raw]] if raw in known else [byte + 3 for byte in raw]
        while True:
            pairs = [known.get(self._pieces[a] + self._pieces[b], -1) for a, b in pairwise(ids)]
            best = max(
                (i for i, pair in enumerate(pairs) if pair >= 0), key=lambda i: self._scores[pairs[i]], default=-1
            )
            if best < 0:
                return ids
            ids[best : best + 2] = [pairs[best]]


# ------------------------------------------------------------------------------------------- what comes of it


@torch.no_grad()
def slim_check(net: Any, name: str, ids: Tensor, folder: Path, console: Console) -> None:
    """Take a channel network out, hold it against the masked one, and save it as transformers saves its models."""
    small = net.slim(name).eval()
    net.eval()
    with net.using(name):
        masked = net(input_ids=ids).logits
    sizes = [sum(p.numel() for p in m.parameters()) for m in (net.model, small)]
    apart = float((small(input_ids=ids).logits - masked).abs().max())
    console.print(f"\nslim {name}: {sizes[0]:,} -> {sizes[1]:,} parameters, differs from masked by {apart:.1e}")
    try:
        small.save_pretrained(folder)
    except SlimError as error:  # its widths are such that no configuration of this type describes them
        console.print(f"{error}")
        return
    read = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()
    apart = float((read(input_ids=ids).logits - masked).abs().max())
    console.print(
        f"saved, and read back by transformers alone: differs by {apart:.1e} (width {read.config.hidden_size}, "
        f"{read.config.num_attention_heads} heads, {read.config.num_key_value_heads} of keys and values)"
    )


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    main()
