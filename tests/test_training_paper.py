"""recipe="paper" is the published method: a plain loop that does as it says gives the same weights, bit by bit."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from training_tiny import sgd, tiny_loaders, tiny_net, tiny_trainer

import cocktailsdk as cocktail
from cocktailsdk.training.data.batches import draw
from cocktailsdk.training.randomness import seed_everything
from cocktailsdk.training.schedules import cosine
from cocktailsdk.training.step.distill import untouched_buffers
from cocktailsdk.utils.undo import forked

EPOCHS, STEPS, WEIGHT = 2, 6, 0.5
UNSTRUCTURED = ["unstructured@0.3", "unstructured@0.5", "unstructured@0.7"]
N_M = [None, "1:2", "1:2"]
CHANNEL = ["channel@0.2", "channel@0.4", "channel@0.5"]


def weights(net: cocktail.CocktailNet) -> dict[str, Tensor]:
    return {n: t.detach().clone() for n, t in [*net.model.named_parameters(), *net.model.named_buffers()]}


def load(net: cocktail.CocktailNet, values: dict[str, Tensor]) -> None:
    net.model.load_state_dict(values)


def plainly_trained() -> tuple[list[dict[str, Tensor]], cocktail.CocktailNet]:
    """The weights that each round ends with."""
    net, (train, _) = tiny_net(), tiny_loaders()
    parameters = dict(net.model.named_parameters())
    net.model.train()
    ends: list[dict[str, Tensor]] = []
    rewind: dict[str, Tensor] = {}
    for k in range(4):
        networks: list[str] = []
        if k:
            load(net, ends[-1])
            made = {}
            for pattern, levels in (("unstructured", UNSTRUCTURED), ("n:m", N_M), ("channel", CHANNEL)):
                if (name := levels[k - 1]) is None:
                    continue
                if name not in levels[: k - 1]:
                    before = net.masks[levels[k - 2]] if k > 1 and pattern != "n:m" else None
                    net.set_mask(name, net.make_masks(name, before, dict(made)))
                made[pattern] = net.masks[name]
                networks.append(name)
            load(net, rewind)
        optimizer = sgd(net.model.parameters())
        schedule = cosine()(optimizer, EPOCHS * STEPS)
        for epoch in range(EPOCHS):
            for i, (x, y) in enumerate(draw(train, (0, "epoch", k, epoch), STEPS)):
                step = epoch * STEPS + i
                seed_everything(0, "step", k, epoch, i)
                optimizer.zero_grad(set_to_none=True)
                if not networks or step % 2 == 0:
                    F.cross_entropy(net.model(x), y).backward()
                else:
                    name = networks[step // 2 % len(networks)]
                    with torch.no_grad(), untouched_buffers(net.model):
                        soft = net.model(x).softmax(-1)
                    with net.using(name, statistics=False):
                        z = net.model(x)
                        each = F.cross_entropy(z, soft, reduction="none")
                        ((1 - WEIGHT) * F.cross_entropy(z, y) + WEIGHT * (each.sum() / len(y))).backward()
                    for n, mask in net.mask_tensors(name).items():
                        parameters[n].grad *= mask
                optimizer.step()
                schedule.step()
            if k == 0 and epoch == 0:
                rewind = weights(net)
        ends.append(weights(net))
    return ends, net


def test_the_papers_rounds_are_those_of_a_plain_loop() -> None:
    with forked():
        ends, plain = plainly_trained()
    trainer = tiny_trainer(merge=False)
    trainer.fit()
    for name, value in trainer.net.model.named_parameters():
        assert torch.equal(value.detach(), ends[-1][name]), name
    for name, mask in trainer.net.masks.items():
        for key, keep in mask.elements.items():
            assert torch.equal(keep, plain.masks[name].elements[key])


def test_the_papers_merging_takes_the_share_with_the_best_mean_over_all_subnets_so_far() -> None:
    with forked():
        ends, net = plainly_trained()
        trainer = tiny_trainer()
        trainer.fit()
        train, held_out = tiny_loaders()
        batches = list(draw(train, (0, "recalibration"), 2))
        held = list(held_out)
        order = [UNSTRUCTURED, N_M, CHANNEL]
        merged, alphas = ends[1], []
        for k in (2, 3):
            names = {n for levels in order for n in levels[:k] if n is not None}
            best: tuple[float, float, dict[str, Tensor]] | None = None
            for alpha in (1.0, 0.7, 0.4):
                candidate = {
                    n: torch.lerp(ends[k][n], v, alpha) if v.is_floating_point() else v for n, v in merged.items()
                }
                right = 0
                for name in sorted(names):
                    load(net, candidate)
                    net.recalibrate(name, batches)
                    with net.using(name), torch.no_grad():
                        net.model.eval()
                        right += sum(int((net.model(x).argmax(1) == y).sum()) for x, y in held)
                if best is None or right > best[0]:
                    best = (right, alpha, candidate)
            assert best is not None
            merged = best[2]
            alphas.append(best[1])
    assert trainer.history.alphas == alphas
    for name, value in trainer.net.model.named_parameters():
        assert torch.equal(value.detach(), merged[name])
