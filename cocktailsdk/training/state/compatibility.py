"""Whether a state that was read is one of this run: a right checksum says nothing of what is in a file.

Everything is looked at before the run takes any of it over, so that the state before can be taken instead.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sized
from fractions import Fraction
from typing import Any, Never

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

_PHASES = ("train", "merge", "finishing", "finish", "done")
_LIKE_PARAMETER = frozenset(
    (
        "exp_avg",
        "exp_avg_sq",
        "exp_inf",
        "max_exp_avg_sq",
        "momentum_buffer",
        "square_avg",
        "acc_delta",
        "grad_avg",
        "sum",
    )
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
    if not isinstance(state, dict):
        _refuse("it is", state)
    for key, kinds in _KINDS.items():
        if not isinstance(state.get(key), kinds) or (key not in state) or isinstance(state[key], bool):
            _refuse(f"{key!r} is", state.get(key))
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
        if not isinstance(own, dict):
            _refuse(f"the statistics of {name!r} are", own)
        _check_tensors("statistics", own, shapes)
    _check_numbers(state, net)
    _check_average(state.get("average"), parameters, options)
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
        if not isinstance(value, Tensor):
            _refuse(f"its mask {key!r:.40} is", value)
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
        if name not in net.names[1:] or wanted is None or tuple(wanted) != tuple(value.shape):
            _refuse("it has a mask that fits nothing,", key)
        if value.dtype != torch.bool:
            _refuse(f"its mask {key!r:.40} is", value)


def check_classes(said: Any) -> None:
    """See that a state says where class logits are, or nothing of them.

    Raises:
        Foreign: It says something else.
    """
    if said is None:
        return
    kinds = {"axis": (int,), "shift": (bool,), "ignored": (int, type(None)), "size": (int, type(None))}
    known = isinstance(said, Mapping) and "axis" in said and said.keys() <= kinds.keys()
    if not known or any(type(value) not in kinds[key] for key, value in said.items()) or said["axis"] not in (1, -1):
        _refuse("its classes are", said)


def _refuse(what: str, found: Any) -> Never:
    said = " ".join(repr(found)[:200].split())
    raise Foreign(f"{what} {said[:57]}{'...' if len(said) > 57 else ''}")


def _check_position(said: dict[str, Any], options: Options) -> None:
    if not {"phase", "round", "entered"} <= said.keys() <= {f.name for f in dataclasses.fields(Position)}:
        _refuse("its position is", said)
    numbers = [value for key, value in said.items() if key not in ("phase", "entered")]
    wrong = any(type(n) is not int or n < 0 for n in numbers) or type(said["entered"]) is not bool
    if wrong or said["phase"] not in _PHASES:
        _refuse("its position is", said)
    if said["round"] > max(options.rounds, options.finishing_round) + 1:
        _refuse(f"this run has {options.rounds} rounds, and it stands in", said["round"])


def _check_history(state: dict[str, Any], files: Mapping[str, bool]) -> None:
    said, like = state["history"], dataclasses.asdict(History())
    rounds = {f.name for f in dataclasses.fields(RoundHistory)}
    if not said.keys() <= like.keys() or "rounds" not in said:
        _refuse("its history has", sorted(map(str, said)))
    for key, value in said.items():
        fits = isinstance(value, int | float) if isinstance(like[key], float) else type(value) is type(like[key])
        if not fits:
            _refuse(f"its history's {key!r} is", value)
    for one in said["rounds"]:
        if not isinstance(one, dict) or not {"round", "networks"} <= one.keys() <= rounds:
            _refuse("its history has the round", one)
        if type(one["round"]) is not int or not _texts(one["networks"]):
            _refuse("its history has the round", one)
    weights = said.get("weights", {})
    if not set(map(str, weights.values())) <= files.keys():
        _refuse("its networks have weights of their own in", list(weights.values()))
    if state["optimization"] is not None and state["position"]["entered"] and not said["rounds"]:
        _refuse("its history has rounds", said["rounds"])


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(v, str) for v in value)


def _check_generators(key: str, said: dict[str, Any] | list[Any], now: Mapping[str, Any]) -> None:
    if isinstance(said, list):  # as release 0.1.0 wrote them
        now = {str(i): state for i, state in enumerate(s for s in now.values() if isinstance(s, Tensor))}
        said = {str(i): state for i, state in enumerate(said)}
        if said.keys() != now.keys():
            _refuse(f"{key!r} are not the states of {len(now)} generators but", said)
    # a loader may make its generators in its first pass, and drop them: only those on both sides can be compared
    for path, state in said.items():
        if not isinstance(path, str) or (path in now and not _alike(state, now[path])):
            _refuse(f"{key!r} has another state of the generator {path!r:.40},", state)


def _check_stream(said: Any) -> None:
    """A state of release 0.1.0 has none."""
    if said is None:
        return
    known = isinstance(said, dict) and said.keys() == {"begun", "drawn", "passes"}
    begun = said["begun"] if known else None
    if not known or not (begun is None or (isinstance(begun, list | tuple) and len(begun) == 3)):
        _refuse("its place in the training loader is", said)
    if any(type(n) is not int or n < 0 for n in (said["drawn"], said["passes"], *(begun or ()))):
        _refuse("its place in the training loader is", said)


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
        if not isinstance(value, Tensor) or name not in shapes or tuple(value.shape) != shapes[name]:
            found = tuple(value.shape) if isinstance(value, Tensor) else value
            _refuse(f"its {what} {name!r:.40} is {shapes.get(name, 'not of this model')} here, and there", found)
    missing = set(shapes) - set(said) if whole else ()
    if missing:
        _refuse(f"its {what} lacks", min(missing))


def _check_hooks(state: Mapping[str, Any], parameters: Shapes, options: Options) -> None:
    """What a hook keeps under a parameter's name, say its gradient, must be like the parameter."""
    if "hooks" not in state:
        if not isinstance(state.get("gradients"), dict):
            _refuse("'gradients' is", state.get("gradients"))
        _check_tensors("gradients", state["gradients"], parameters)
        return
    states, hooks = state["hooks"], options.recipe.step_hooks()
    if not isinstance(states, list) or len(states) != len(hooks) or not all(isinstance(s, dict) for s in states):
        _refuse(f"it has the states of other hooks than this recipe's {len(hooks)},", states)
    for own in states:
        _check_tensors("hooks", {n: v for n, v in own.items() if n in parameters}, parameters)


def _of_networks(what: str, said: dict[Any, Any], net: SubnetModel) -> list[tuple[str, Any]]:
    if odd := [name for name in said if name not in net.names]:
        _refuse(f"its {what} are of", odd[0])
    return list(said.items())


def _check_numbers(state: dict[str, Any], net: SubnetModel) -> None:
    for name, value in _of_networks("losses", state["losses"], net):
        if not isinstance(value, Tensor) or value.numel() > 4:
            _refuse(f"the losses of {name!r} are", value)
    for name, value in _of_networks("metrics", state["metrics"], net):
        if not isinstance(value, int | float):
            _refuse(f"the metric of {name!r} is", value)
    for row in state["judged"]:
        try:
            alpha, name, part, value, maximum = row
            float(alpha), int(part), Fraction(value), Fraction(maximum or 0)
        except (TypeError, ValueError, ZeroDivisionError):
            _refuse("it has judged", row)
        if name not in net.names:
            _refuse("it has judged", row)
    check_classes(state["classes"])
    if type(state.get("skipped_in_a_row", 0)) is not int:
        _refuse("its skipped steps are", state["skipped_in_a_row"])


def _check_average(said: Any, parameters: Shapes, options: Options) -> None:
    if options.settings.execution.ema_decay is None:
        return
    if not isinstance(said, dict) or type(said.get("steps")) is not int or not isinstance(said.get("values"), dict):
        _refuse("its average is", said)
    _check_tensors("average", said["values"], parameters)


def _check_optimization(state: dict[str, Any], net: SubnetModel, options: Options) -> None:
    for key in ("optimization", "rewound"):
        if state[key] is None:
            continue
        round_ = state["position"]["round"]
        fresh = Optimization.begin(net.model, options, round_, next(net.model.parameters()).device)
        like, said = fresh.state_dict(), state[key]
        if said.keys() != like.keys() or any(type(part) is not type(like[k]) for k, part in said.items()):
            _refuse(f"{key!r} is", said)
        if not _alike(said.get("foreign"), like.get("foreign")):
            _refuse("parameters that its optimizer trains beside the model's are", said["foreign"])
        if said["scheduler"].keys() != like["scheduler"].keys():
            _refuse("its schedule holds", sorted(map(str, said["scheduler"])))
        own = [p for group in fresh.optimizer.param_groups for p in group["params"]]
        _check_optimizer(said["optimizer"], like["optimizer"], [tuple(p.shape) for p in own])


def _check_optimizer(said: dict[str, Any], like: dict[str, Any], shapes: list[tuple[int, ...]]) -> None:
    groups = said.get("param_groups")
    if not isinstance(groups, list) or not isinstance(said.get("state"), dict):
        _refuse("its optimizer holds", said)
    found = [sorted(map(str, g)) if isinstance(g, dict) else g for g in groups]
    if found != [sorted(g) for g in like["param_groups"]]:
        _refuse("its optimizer's groups hold", found)
    if [g["params"] for g in groups] != [g["params"] for g in like["param_groups"]]:
        _refuse("its optimizer's groups are of", [g["params"] for g in groups])
    for index, own in said["state"].items():
        if type(index) is not int or not 0 <= index < len(shapes) or not isinstance(own, dict):
            _refuse("its optimizer has kept something of parameter", index)
        for key, value in own.items():
            if key in _LIKE_PARAMETER and value is not None:
                if not isinstance(value, Tensor) or tuple(value.shape) != shapes[index]:
                    _refuse(f"its optimizer's {key!r} is", value)
            elif key == "step" and not (
                isinstance(value, int | float) or (isinstance(value, Tensor) and value.numel() == 1)
            ):
                _refuse("its optimizer's step is", value)


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
    if missing := set(rounds) - files.keys():
        _refuse("it names no file for", min(missing))
    masks: dict[str, Mask] = {}
    for name in rounds:  # in order, since each builds on the masks of the rounds before
        masks |= check_masks(tensors(name), net, masks)
    for name in (name for name, needed in files.items() if needed and not name.startswith("masks-")):
        found = {n: tuple(t.shape) for n, t in tensors(name).items()}
        if any(found.get(n) != shape for n, shape in shapes.items()):
            odd = min(n for n, shape in shapes.items() if found.get(n) != shape)
            _refuse(f"{name} has {odd!r} of another shape than the model, or lacks it:", found.get(odd))
