"""Train a few sparse networks of a small model at once, save them, choose one, and make it physically smaller.

    python examples/quickstart.py [FOLDER]

Takes well under a minute on two cores. The images are scikit-learn's digits: pip install "cocktailsdk[presets]"
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

import cocktailsdk as cocktail
from cocktailsdk.presets import get_preset


def main(folder: Path) -> None:
    preset = get_preset("digits")
    model = preset.build_model(seed=0)
    train, merge, test = preset.loaders()
    x, labels = next(iter(test))

    patterns = [cocktail.Unstructured(rounds=3), "2:4", cocktail.Channel(rounds=3, rate=0.2, round_to=1)]
    net = cocktail.sparsify(model, patterns, example_inputs=(x[:1],))
    trainer = cocktail.CoTrainer(net, train, cross_entropy, val_loader=merge, total_steps=400, out_dir=folder)
    trainer.fit()  # run the script again: it finds its state and has nothing left to do
    accuracy = trainer.evaluate(test)
    for s in net.subnets():
        print(f"{s.name:20} accuracy {accuracy[s.name]:.3f}  {s.params:7,} parameters  {s.flops:9,} FLOPs")

    net.save_pretrained(folder / "bundle")
    net = cocktail.from_pretrained(folder / "bundle", preset.build_model(seed=1)).eval()
    small = net.slim("channel@0.488")
    with net.using("channel@0.488"), torch.no_grad():
        difference = (net(x) - small(x)).abs().max().item()
    print(f"slim differs from masked by {difference:.1e}, and is right on {(small(x).argmax(1) == labels).sum()} of "
          f"{len(labels)} images")  # fmt: skip


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/quickstart"))
