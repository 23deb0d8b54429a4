"""Whether a state that was read is one of this run: a right checksum says nothing of what is in a file.

Everything is looked at before the run takes any of it over, so that the state before can be taken instead.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Mapping, Sized
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from ...errors import BundleError
from ...masks import Mask
from ...net.subnet_model import SubnetModel
from ..optimization import Optimization
from ..options import Options
from .encoding import decode_masks, written_before
from .history import History, Position, RoundHistory

__all__ = ["Foreign", "check_classes", "check_masks", "check_state", "hook_states"]

Shapes = Mapping[str, tuple[int, ...]]

_PHASES = ("train", "merge", "finishing", "refit", "finish", "done")
_LIKE_PARAMETER = frozenset[str]().union(
    ("momentum_buffer",),  # SGD, RMSprop
    ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf"),  # Adam and its kin
    ("square_avg", "acc_delta", "grad_avg", "sum"),  # Adadelta, RMSprop, Adagrad
)
"""What torch's optimizers keep for each element of a parameter."""
_KINDS: Mapping[str, tuple[type, ...]] = {
    "position": (dict,),
    "history": (dict,),
    "classes": (dict, type(None)),
    "first_generators": (dict, list),
    "generators": (dict, list),
    "losses": (dict,),
    "judged": (list,),
    "held_examples": (Tensor, type(None)),
    "held_scores": (int,),
    "masks": (dict,),
    "rewound": (dict, type(None)),
    "model": (dict,),
    "optimization": (dict, type(None)),
    "statistics": (dict,),
    "metrics": (dict,),
}


class Foreign(Exception):
    """A state holds something else than a state of this run."""


def check_state(
    state: Any,
    net: SubnetModel,
    options: Options,
    generators: Mapping[str, Any],
    files: Mapping[str, bool],
    tensors: Callable[[str], Mapping[str, Tensor]],
) -> None:
    """See that a state, and the files that it names, fit the run.

    Args:
        state: What was read.
        net: The run's networks.
        options: What is asked for.
        generators: States of the training loader's own generators now.
        files: The files that the state names, and whether it still needs them.
        tensors: Reads the tensors in one of these files.

    Raises:
        Foreign: Something does not fit; says what.
    """
    _require(isinstance(state, dict), "it is", state)
    for key, kinds in _KINDS.items():
        fits = key in state and isinstance(state[key], kinds) and not isinstance(state[key], bool)
        _require(fits, f"{key!r} is", state.get(key))
    shapes = {n: tuple(t.shape) for n, t in [*net.model.named_parameters(), *net.model.named_buffers()]}
    parameters = {n: tuple(p.shape) for n, p in net.model.named_parameters()}
    _check_position(state["position"], options)
    _check_history(state, files)
    for key in ("first_generators", "generators"):
        _check_generators(key, state[key], generators)
    _check_stream(state.get("stream"))
    _check_tensors("model", state["model"], shapes, whole=True)
    _check_hooks(state, parameters, options)
    for name, own in _of_networks("statistics", state["statistics"], net):
        _require(isinstance(own, dict), f"the statistics of {name!r} are", own)
        _check_tensors("statistics", own, shapes)
    for key in ("private", "heads"):  # a state of release 0.1 has none
        _require(isinstance(state.get(key, {}), dict), f"{key!r} is", state.get(key))
    for name, own in _of_networks("private tensors", state.get("private", {}), net):
        _require(isinstance(own, dict), f"the private tensors of {name!r} are", own)
        _check_tensors("private tensors", own, parameters)
    for name, head in _of_networks("heads", state.get("heads", {}), net):
        fits = head is None or (isinstance(head, dict) and isinstance(head.get("weight"), Tensor))
        _require(fits and (head is None or head.keys() == {"weight", "bias"}), f"the head of {name!r} is", head)
    _check_numbers(state, net)
    _check_average(state.get("average"), parameters, options)
    _check_shares(state, net, options)
    check_masks(state["masks"], net)
    _check_optimization(state, net, options)
    _check_files(state["position"], files, tensors, net, options, shapes)


def hook_states(state: Mapping[str, Any], hooks: Sized) -> list[dict[str, Any]]:
    """The states of a run's hooks.

    Before there were hooks, a state had the gradients of the step before, which the one schedule that used them (that
    of ``"ast"``) still names in the same way.
    """
    if "hooks" in state:
        states: list[dict[str, Any]] = state["hooks"]
        return states
    return [dict(state["gradients"]), *({} for _ in range(len(hooks) - 1))] if len(hooks) else []


def check_masks(
    tensors: Mapping[Any, Any], net: SubnetModel, base: Mapping[str, Mask] | None = None
) -> dict[str, Mask]:
    """See that stored masks are of a net's subnetworks and weights.

    Args:
        tensors: The masks, as :func:`~cocktailsdk.training.state.encoding.encode_masks` writes them or as older
            releases did.
        net: The networks.
        base: Masks that these may build on.

    Returns:
        The masks.

    Raises:
        Foreign: They are not.
    """
    for key, value in tensors.items():
        _require(isinstance(value, Tensor), f"its mask {key!r:.40} is", value)
    if written_before(tensors):
        _check_plain_masks(tensors, net)
    try:
        return decode_masks(tensors, net, base)
    except BundleError as error:
        raise Foreign(f"its masks cannot be decoded ({error})") from error


def _check_plain_masks(tensors: Mapping[Any, Tensor], net: SubnetModel) -> None:
    """See that masks of older releases, one bool tensor each, fit a net."""
    for key, value in tensors.items():
        name, _, rest = str(key).partition("/")
        kind, _, parameter = rest.partition("/")
        wanted = {
            "elements": net.coupling.shapes.get(parameter),
            "removed": (net.coupling.n_units,),
            "nothing": (0,),
        }.get(kind)
        fits = name in net.names[1:] and wanted is not None and tuple(wanted) == tuple(value.shape)
        _require(fits, "it has a mask that fits nothing,", key)
        _require(value.dtype == torch.bool, f"its mask {key!r:.40} is", value)


def check_classes(said: Any) -> None:
    """See that a state says where class logits are, or nothing of them.

    Raises:
        Foreign: It says something else.
    """
    if said is None:
        return
    kinds = {"axis": (int,), "shift": (bool,), "ignored": (int, type(None)), "size": (int, type(None))}
    known = isinstance(said, Mapping) and "axis" in said and said.keys() <= kinds.keys()
    fits = known and all(type(value) in kinds[key] for key, value in said.items()) and said["axis"] in (1, -1)
    _require(fits, "its classes are", said)


def _require(fits: bool, what: str, found: Any) -> None:
    """Refuse a state in which something does not fit, and say what was found."""
    if not fits:
        said = " ".join(repr(found)[:200].split())
        raise Foreign(f"{what} {said[:57]}{'...' if len(said) > 57 else ''}")


def _check_position(said: dict[str, Any], options: Options) -> None:
    known = {"phase", "round", "entered"} <= said.keys() <= {f.name for f in dataclasses.fields(Position)}
    numbers = [value for key, value in said.items() if key not in ("phase", "entered")]
    fits = known and said["phase"] in _PHASES and type(said["entered"]) is bool and all(map(_is_count, numbers))
    _require(fits, "its position is", said)
    last = max(options.rounds, options.finishing_round) + 1
    _require(said["round"] <= last, f"this run has {options.rounds} rounds, and it stands in", said["round"])


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _check_history(state: dict[str, Any], files: Mapping[str, bool]) -> None:
    said, like = state["history"], dataclasses.asdict(History())
    rounds = {f.name for f in dataclasses.fields(RoundHistory)}
    _require("rounds" in said and said.keys() <= like.keys(), "its history has", sorted(map(str, said)))
    for key, value in said.items():
        fits = isinstance(value, int | float) if isinstance(like[key], float) else type(value) is type(like[key])
        _require(fits, f"its history's {key!r} is", value)
    for one in said["rounds"]:
        fits = isinstance(one, dict) and {"round", "networks"} <= one.keys() <= rounds
        fits = fits and type(one["round"]) is int and isinstance(one["networks"], list)
        fits = fits and all(isinstance(name, str) for name in one["networks"])
        _require(fits, "its history has the round", one)
    weights = [*said.get("weights", {}).values()]
    _require(set(map(str, weights)) <= files.keys(), "its networks have weights of their own in", weights)
    begun = state["optimization"] is not None and state["position"]["entered"]
    _require(not begun or bool(said["rounds"]), "its history has rounds", said["rounds"])


def _check_generators(key: str, said: dict[str, Any] | list[Any], now: Mapping[str, Any]) -> None:
    if isinstance(said, list):  # as release 0.1.0 wrote them
        now = {str(i): state for i, state in enumerate(s for s in now.values() if isinstance(s, Tensor))}
        said = {str(i): state for i, state in enumerate(said)}
        _require(said.keys() == now.keys(), f"{key!r} are not the states of {len(now)} generators but", said)
    # a loader may make its generators in its first pass, and drop them: only those on both sides can be compared
    for path, state in said.items():
        fits = isinstance(path, str) and (path not in now or _alike(state, now[path]))
        _require(fits, f"{key!r} has another state of the generator {path!r:.40},", state)


def _check_stream(said: Any) -> None:
    """A state of release 0.1.0 has none."""
    if said is None:
        return
    fits = isinstance(said, dict) and said.keys() == {"begun", "drawn", "passes"}
    begun = said["begun"] if fits else None
    fits = fits and (begun is None or (isinstance(begun, list | tuple) and len(begun) == 3))
    fits = fits and all(map(_is_count, (said["drawn"], said["passes"], *(begun or ()))))
    _require(fits, "its place in the training loader is", said)


def _alike(a: Any, b: Any) -> bool:
    """Whether two values differ in numbers and texts alone."""
    if type(a) is not type(b):
        return {type(a), type(b)} <= {float, type(None)}  # the second number of a pair that Python's generator keeps
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(_alike(v, b[k]) for k, v in a.items())
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(_alike, a, b))
    return True


def _check_tensors(what: str, said: Mapping[Any, Any], shapes: Shapes, *, whole: bool = False) -> None:
    for name, value in said.items():
        found = tuple(value.shape) if isinstance(value, Tensor) else value
        fits = isinstance(value, Tensor) and found == shapes.get(name)
        _require(fits, f"its {what} {name!r:.40} is {shapes.get(name, 'not of this model')} here, and there", found)
    for name in sorted(shapes) if whole else ():
        _require(name in said, f"its {what} lacks", name)


def _check_hooks(state: Mapping[str, Any], parameters: Shapes, options: Options) -> None:
    """What a hook keeps under a parameter's name, say its gradient, must be like the parameter."""
    if "hooks" not in state:
        gradients: Any = state.get("gradients")
        _require(isinstance(gradients, dict), "'gradients' is", gradients)
        _check_tensors("gradients", gradients, parameters)
        return
    states, count = state["hooks"], len(options.recipe.step_hooks())
    fits = isinstance(states, list) and len(states) == count and all(isinstance(s, dict) for s in states)
    _require(fits, f"it has the states of other hooks than this recipe's {count},", states)
    for own in states:
        _check_tensors("hooks", {n: v for n, v in own.items() if n in parameters}, parameters)


def _of_networks(what: str, said: dict[Any, Any], net: SubnetModel) -> list[tuple[str, Any]]:
    for name in said:
        _require(name in net.names, f"its {what} are of", name)
    return list(said.items())


def _check_numbers(state: dict[str, Any], net: SubnetModel) -> None:
    for name, value in _of_networks("losses", state["losses"], net):
        _require(isinstance(value, Tensor) and value.numel() <= 4, f"the losses of {name!r} are", value)
    for name, value in _of_networks("metrics", state["metrics"], net):
        _require(isinstance(value, int | float), f"the metric of {name!r} is", value)
    for row in state["judged"]:
        fits = False
        with contextlib.suppress(TypeError, ValueError, ZeroDivisionError):
            alpha, name, part, value, maximum = row
            float(alpha), int(part), Fraction(value), Fraction(maximum or 0)
            fits = name in net.names
        _require(fits, "it has judged", row)
    check_classes(state["classes"])
    skipped = state.get("skipped_in_a_row", 0)
    _require(type(skipped) is int, "its skipped steps are", skipped)


def _check_average(said: Any, parameters: Shapes, options: Options) -> None:
    if options.settings.execution.ema_decay is None:
        return
    fits = isinstance(said, dict) and type(said.get("steps")) is int and isinstance(said.get("values"), dict)
    _require(fits, "its average is", said)
    _check_tensors("average", said["values"], parameters)


def _check_shares(state: dict[str, Any], net: SubnetModel, options: Options) -> None:
    """What networks are owed, and what was measured of them."""
    if options.recipe.allocation is None:
        return
    owed = state.get("owed")
    fits = isinstance(owed, dict) and all(isinstance(v, float) and math.isfinite(v) for v in owed.values())
    _require(fits, "the passes that networks are owed are", owed)
    _of_networks("owed passes", owed or {}, net)
    for one in state["history"].get("measured", []):
        fits = (
            isinstance(one, dict)
            and one.keys() == {"step", "losses", "accuracies", "shares"}
            and _is_count(one["step"])
        )
        for values in (one["losses"], one["shares"]) if fits else ():
            fits = fits and isinstance(values, dict) and values.keys() == set(net.names)
            fits = fits and all(isinstance(value, float) for value in values.values())
        _require(fits, "it has measured", one)


def _check_optimization(state: dict[str, Any], net: SubnetModel, options: Options) -> None:
    for key in ("optimization", "rewound"):
        if state[key] is None:
            continue
        round_ = state["position"]["round"]
        fresh = Optimization.begin(net.model, options, round_, next(net.model.parameters()).device)
        like, said = fresh.state_dict(), state[key]
        fits = said.keys() == like.keys() and all(type(part) is type(like[k]) for k, part in said.items())
        _require(fits, f"{key!r} is", said)
        foreign = said.get("foreign")
        fits = _alike(foreign, like.get("foreign"))
        _require(fits, "parameters that its optimizer trains beside the model's are", foreign)
        fits = said["scheduler"].keys() == like["scheduler"].keys()
        _require(fits, "its schedule holds", sorted(map(str, said["scheduler"])))
        own = [p for group in fresh.optimizer.param_groups for p in group["params"]]
        _check_optimizer(said["optimizer"], like["optimizer"], [tuple(p.shape) for p in own])


def _check_optimizer(said: dict[str, Any], like: dict[str, Any], shapes: list[tuple[int, ...]]) -> None:
    groups: Any = said.get("param_groups")
    _require(isinstance(groups, list) and isinstance(said.get("state"), dict), "its optimizer holds", said)
    found = [sorted(map(str, g)) if isinstance(g, dict) else g for g in groups]
    _require(found == [sorted(g) for g in like["param_groups"]], "its optimizer's groups hold", found)
    members = [g["params"] for g in groups]
    _require(members == [g["params"] for g in like["param_groups"]], "its optimizer's groups are of", members)
    for index, own in said["state"].items():
        fits = type(index) is int and 0 <= index < len(shapes) and isinstance(own, dict)
        _require(fits, "its optimizer has kept something of parameter", index)
        for key, value in own.items():
            if key in _LIKE_PARAMETER and value is not None:
                fits = isinstance(value, Tensor) and tuple(value.shape) == shapes[index]
                _require(fits, f"its optimizer's {key!r} is", value)
            elif key == "step":
                fits = value.numel() == 1 if isinstance(value, Tensor) else isinstance(value, int | float)
                _require(fits, "its optimizer's step is", value)


def _check_files(
    position: dict[str, Any],
    files: Mapping[str, bool],
    tensors: Callable[[str], Mapping[str, Tensor]],
    net: SubnetModel,
    options: Options,
    shapes: Shapes,
) -> None:
    made = position["round"] + (position["entered"] or position["phase"] != "train")
    rounds = [f"masks-{k:02d}" for k in range(1, min(made, options.finishing_round))]
    for name in rounds:
        _require(name in files, "it names no file for", name)
    masks: dict[str, Mask] = {}
    for name in rounds:  # in order, since each builds on the masks of the rounds before
        masks |= check_masks(tensors(name), net, masks)
    for name in (name for name, needed in files.items() if needed and not name.startswith("masks-")):
        found = {n: tuple(t.shape) for n, t in tensors(name).items()}
        for n, shape in sorted(shapes.items()):
            fits = found.get(n) == shape
            _require(fits, f"{name} has {n!r} of another shape than the model, or lacks it:", found.get(n))
