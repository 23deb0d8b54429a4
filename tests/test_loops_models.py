"""Models and losses that training copes with: frozen, tied, checkpointed, compiled; several losses, any output."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from training_tiny import assert_identical, result

import cocktailsdk as cocktail
from cocktailsdk.training import events as ev
from cocktailsdk.training.step.forward import detached


class Body(nn.Module):
    """Tokens to hidden states to logits; in training, blocks may be computed again instead of kept."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(12, 16)
        self.up = nn.Linear(16, 32)
        self.down = nn.Linear(32, 16)
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 12, bias=False)
        if tied:
            self.head.weight = self.embedding.weight
        self.checkpointed = False
        self.ran = 0

    def block(self, x: Tensor) -> Tensor:
        self.ran += 1
        return x + self.down(F.gelu(self.up(x)))

    def logits(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        x = checkpoint(self.block, x, use_reentrant=False) if self.checkpointed and self.training else self.block(x)
        return self.head(self.norm(x).mean(1))

    def forward(self, tokens: Tensor) -> Any:
        return self.logits(tokens)


@dataclasses.dataclass(frozen=True, slots=True)
class Found:
    logits: Tensor
    hidden: tuple[Tensor, ...]
    note: str = "as given"


@dataclasses.dataclass
class Known:
    logits: Tensor


torch.export.register_dataclass(Known)


class Registered(Body):
    def forward(self, tokens: Tensor) -> Any:
        return Known(self.logits(tokens))


class Framed(Body):
    def forward(self, tokens: Tensor) -> Any:
        logits = self.logits(tokens)
        return Found(logits, (logits * 2,))


class Named(Body):
    def forward(self, tokens: Tensor) -> Any:
        logits = self.logits(tokens)
        return {"logits": logits, "extra": logits.mean()}


def data() -> list[tuple[Tensor, Tensor]]:
    tokens = torch.randint(0, 12, (24, 5), generator=torch.Generator().manual_seed(0))
    return list(zip(tokens.split(6), tokens[:, 0].split(6), strict=True))


def made(kind: type[Body] = Body, *, patterns: Any = ("unstructured@0.5", "2:4"), **options: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = kind(**options)
    return cocktail.sparsify(
        model, patterns, example_inputs=(data()[0][0],), target_modules=["up", "head"] if options else None
    )


def train(net: Any, loss_fn: Any = F.cross_entropy, **options: Any) -> cocktail.CoTrainer:
    settings: dict[str, Any] = {
        "optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
        "epochs": 2,
        "val_loader": data()[:2],
        "evaluation": cocktail.EvaluationSettings(recalibration_batches=2),
    }
    trainer = cocktail.CoTrainer(net, data(), loss_fn, **{**settings, **options})
    trainer.fit()
    return trainer


def from_logits(output: Any, target: Tensor) -> Tensor:
    return F.cross_entropy(output["logits"] if isinstance(output, dict) else output.logits, target)


def test_frozen_parameters_stay_as_they_are_and_are_masked_all_the_same() -> None:
    net = made()
    frozen = {"up.weight": net.model.up.weight, "embedding.weight": net.model.embedding.weight}
    for parameter in frozen.values():
        parameter.requires_grad_(False)
    before = {name: p.clone() for name, p in frozen.items()}
    down = net.model.down.weight.clone()
    train(net)
    assert all(torch.equal(p, before[name]) for name, p in frozen.items())
    assert not torch.equal(net.model.down.weight, down)
    with net.using("2:4"):
        assert (net.model.up.weight == 0).sum() == net.model.up.weight.numel() // 2


def test_tied_weights_stay_tied_and_are_masked_in_both_places() -> None:
    net = made(tied=True)
    train(net)
    assert net.model.head.weight is net.model.embedding.weight
    assert any(w.name in ("head.weight", "embedding.weight") for w in net.eligible)
    with net.using("2:4"):
        runs = net.model.embedding.weight.reshape(-1, 4)
        assert ((runs != 0).sum(1) <= 2).all()


def test_several_losses_are_added() -> None:
    def several(output: Tensor, target: Tensor) -> dict[str, Tensor]:
        return {"labels": F.cross_entropy(output, target), "small": 0.01 * output.square().mean()}

    def one(output: Tensor, target: Tensor) -> Tensor:
        return torch.stack(list(several(output, target).values())).sum()

    nets = [made(), made()]
    # the sum is no cross-entropy, but outputs and labels tell all the same what can be distilled
    results = [result(train(net, loss_fn)) for net, loss_fn in zip(nets, (several, one), strict=True)]
    assert_identical(*results)
    with pytest.raises(cocktail.TrainingError, match=r"must return a scalar tensor, got dict"):
        train(made(), lambda output, target: {"labels": F.cross_entropy(output, target, reduction="none")})


@pytest.mark.parametrize("kind", [Framed, Registered, Named])
@pytest.mark.parametrize("same_batch", [False, True])
def test_outputs_may_be_dicts_and_frozen_dataclasses(kind: type[Body], same_batch: bool) -> None:
    from cocktailsdk.training.recipes import recipe_named

    recipe = dataclasses.replace(recipe_named("cocktail"), same_batch=same_batch)
    plain, other = made(), made(kind)
    results = [
        result(train(plain, recipe=recipe)),
        result(train(other, from_logits, recipe=recipe)),
    ]
    assert_identical(*results)


def test_a_dataclass_is_detached_in_all_its_parts() -> None:
    x = torch.ones(2, requires_grad=True)
    found = Found(x * 2, (x * 3,))
    kept = detached(found)
    assert not kept.logits.requires_grad and not kept.hidden[0].requires_grad and kept.note == "as given"
    assert found.logits.requires_grad


def test_activation_checkpoints_change_no_bit() -> None:
    results, ran = [], []
    for checkpointed in (False, True):
        net = made()
        net.model.checkpointed, net.model.ran = checkpointed, 0
        results.append(result(train(net)))
        ran.append(net.model.ran)
    assert_identical(*results)
    assert ran[1] > ran[0]  # blocks were computed again, under the masks of the step


def test_a_compiled_model_is_not_compiled_again_when_masks_change() -> None:
    compiled: list[int] = []
    at: dict[int, int] = {}

    def backend(module: torch.fx.GraphModule, inputs: Any) -> Any:
        compiled.append(len(inputs))
        return module.forward

    def watch(event: ev.Event) -> None:
        if isinstance(event, ev.RoundEnded):
            at[event.round] = len(compiled)

    three = [cocktail.Unstructured(sparsities=[0.3, 0.5, 0.7]), "2:4"]
    plain, net = made(patterns=three), made(patterns=three)
    torch.compiler.reset()
    net.model.compile(backend=backend)
    trainer = train(net, callbacks=[watch])
    assert compiled and trainer.history.steps > 20
    assert len({at[k] for k in (1, 2, 3, 4)}) == 1 and len(compiled) == at[1]  # new masks in every round
    assert_identical(result(trainer)["masks"], result(train(plain))["masks"])
