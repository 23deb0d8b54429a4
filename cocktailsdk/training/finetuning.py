"""Training one chosen subnetwork alone, under its mask."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any, TypeVar

from ..errors import PatternError, TrainingError
from ..masks import Mask
from ..net.subnet_model import SubnetModel, constructible
from ..patterns import Pattern
from ..patterns.base import DENSE
from ..patterns.registry import parse_pattern
from ..utils.fsdp import local
from ..utils.losses import LossFn
from .keywords import MOVED, current_keywords
from .recipes import Pruning, Recipe
from .settings import RoundSettings
from .trainer import CoTrainer

__all__ = ["finetune"]

FIXED = ("recipe", "start", "rounds", "distillation")
"""Arguments of the trainer that fine-tuning sets itself."""
NetT = TypeVar("NetT", bound=SubnetModel)


def finetune(net: NetT, name: str, train_loader: Iterable[Any], loss_fn: LossFn | None = None, **options: Any) -> NetT:
    """Train one subnetwork alone, from the weights that it has in a net; the net does not change.

    Its mask stays: neither gradients nor momentum nor weight decay move a masked weight, and all of them are seen to
    be exactly 0 at the end.

    Args:
        net: The networks, trained.
        name: Which one: a subnet's name.
        train_loader: As of :class:`~cocktailsdk.CoTrainer`.
        loss_fn: As there. To distil, let it compare with a teacher of yours.
        **options: All others of :class:`~cocktailsdk.CoTrainer` that make sense for one network: ``epochs``,
            ``optimizer``, ``schedule``, ``val_loader``, ``out_dir``, ``execution`` and so on. ``total_steps`` is a
            budget.

    Returns:
        A net of this network alone, which is active: ``.model`` is a copy of the model whose masked weights are 0. It
        slims, evaluates and saves as any net does.

    Raises:
        SubnetError: There is no such subnetwork, or it has no mask yet.
        TrainingError: It is the dense one, an option makes no sense here, or a masked weight is not 0 in the end.
    """
    if not isinstance(net, SubnetModel):
        raise TrainingError(f"net must be what cocktailsdk.sparsify() returned, got {type(net).__name__}")
    subnet = net.subnet(name)
    if subnet.name == DENSE:
        raise TrainingError("finetune() trains a subnet under its mask, and the dense network has none: train .model")
    if fixed := [option for option in options if option in FIXED or MOVED.get(option, ("",))[0] in FIXED]:
        raise TrainingError(f"finetune() trains one network for one round: leave out {', '.join(fixed)}")
    options = current_keywords(options, caller="finetune")
    with net.using(subnet.name):
        model = copy.deepcopy(net.model)
    mask = net.masks[subnet.name]
    pattern = _alone(net.pattern(subnet.pattern), subnet.name)
    tuned = constructible(type(net))(model, (pattern,), net.coupling, net.selection, net.example, {subnet.name: mask})
    if net.provenance:
        tuned.provenance["from"] = copy.deepcopy(net.provenance)
    recipe = Recipe(
        name="finetune",
        schedule="single",
        masks=_held,
        rounds="one",
        rewind=False,
        distill=False,
        update="active",
        merging="none",
    )
    rounds = RoundSettings(merge=False)
    CoTrainer(tuned, train_loader, loss_fn, recipe=recipe, start="pretrained", rounds=rounds, **options).fit()
    _check(tuned, subnet.name)
    return tuned.switch(subnet.name)


# The name is part of the configuration of every run by finetune(), so that runs of older releases can be resumed.
def _held(pruning: Pruning) -> dict[str, Mask]:
    return {name: pruning.net.masks[name] for name in pruning.new}


def _alone(pattern: Pattern, name: str) -> Pattern:
    """A pattern with one subnet of a pattern's."""
    if len(pattern.subnets()) == 1:
        return pattern
    one = pattern.alone(name) or parse_pattern(name)
    if one.name != pattern.name or [s.name for s in one.subnets()] != [name]:
        raise PatternError(
            f"the pattern {pattern.name!r} must know its subnet's name as a string that stands for it alone "
            f"(parse): {name!r} is read as {', '.join(s.name for s in one.subnets())}"
        )
    return one


def _check(net: SubnetModel, name: str) -> None:
    parameters = dict(net.model.named_parameters())
    for key, mask in net.mask_tensors(name).items():
        moved = int(((mask == 0) & (local(parameters[key].detach()) != 0)).sum())
        if moved:
            raise TrainingError(
                f"{moved} masked weights of {key!r} are not 0 after fine-tuning {name!r}: something else than the "
                "optimizer changed them (a callback, the model's own code?)"
            )
