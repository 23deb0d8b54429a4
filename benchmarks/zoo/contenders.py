"""Who slims: this package, and Torch-Pruning as its own examples use it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from models import Inputs
from torch import nn


@dataclass(frozen=True)
class Contender:
    """One way to slim.

    Attributes:
        grouping: Finds the groups of a model; returns ``group_s``, the seconds that this took, and ``groups``.
        slim: Removes a share of the channels.
    """

    grouping: Callable[[nn.Module, Inputs], dict[str, Any]]
    slim: Callable[[nn.Module, Inputs, float], nn.Module]


def _grouping_cocktail(model: nn.Module, inputs: Inputs) -> dict[str, Any]:
    from cocktailsdk.graph.couple import Pass
    from cocktailsdk.graph.export import export

    began = time.perf_counter()
    exported = export(model, *inputs)
    between = time.perf_counter()
    coupling = Pass(model, exported=exported).coupling()
    return {
        "group_s": round(time.perf_counter() - between, 3),
        "export_s": round(between - began, 3),
        "groups": len(coupling.groups),
        "units": coupling.n_units,
        "unknown": dict(coupling.unknown_ops),
        "scopes": len(exported.scopes),
    }


def _slim_cocktail(model: nn.Module, inputs: Inputs, ratio: float) -> nn.Module:
    import cocktailsdk as cocktail

    return cocktail.slim(model, *inputs, ratio=ratio, round_to=1)


def _example(inputs: Inputs) -> Any:
    return inputs[0][0] if inputs[0] else dict(inputs[1])


def _grouping_torch_pruning(model: nn.Module, inputs: Inputs) -> dict[str, Any]:
    import torch_pruning

    began = time.perf_counter()
    graph = torch_pruning.DependencyGraph().build_dependency(model, example_inputs=_example(inputs))
    groups = sum(1 for _ in graph.get_all_groups())
    return {"group_s": round(time.perf_counter() - began, 3), "groups": groups}


def _slim_torch_pruning(model: nn.Module, inputs: Inputs, ratio: float) -> nn.Module:
    import torch_pruning

    heads: dict[nn.Module, int] = {}
    for module in model.modules():
        n = next((v for a in ("num_heads", "num_attention_heads", "n_heads") if (v := getattr(module, a, None))), None)
        if isinstance(n, int):
            parts = "qkv query key value q_proj k_proj v_proj q_lin k_lin v_lin q k v".split()
            heads |= {part: n for a in parts if isinstance(part := getattr(module, a, None), nn.Linear)}
    pruner = torch_pruning.pruner.BasePruner(
        model,
        _example(inputs),
        importance=torch_pruning.importance.GroupMagnitudeImportance(p=1),
        pruning_ratio=ratio,
        num_heads=heads,
        ignored_layers=_classifier(model),
    )
    for group in pruner.step(interactive=True):
        group.prune()
    for module in model.modules():
        _mend_heads(module, pruner.num_heads)
    return model


def _classifier(model: nn.Module) -> list[nn.Module]:
    found: list[nn.Module] = []
    for name in ("head", "fc", "classifier"):
        head = getattr(model, name, None)
        found += [m for m in head.modules() if isinstance(m, nn.Linear)][-1:] if isinstance(head, nn.Module) else []
    last = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)][-1]
    if not found and getattr(last, "out_features", getattr(last, "out_channels", 0)) == 1000:
        found.append(last)
    return found


def _mend_heads(module: Any, heads: dict[nn.Module, int]) -> None:
    """What Torch-Pruning's own examples do by hand after pruning attention."""
    qkv, query = getattr(module, "qkv", None), getattr(module, "query", None)
    if isinstance(qkv, nn.Linear) and hasattr(module, "num_heads") and qkv in heads:
        module.num_heads = heads[qkv]
        module.head_dim = qkv.out_features // (3 * module.num_heads)
        if hasattr(module, "attn_dim"):
            module.attn_dim = module.head_dim * module.num_heads
    if isinstance(query, nn.Linear) and hasattr(module, "num_attention_heads"):
        module.num_attention_heads = heads.get(query, module.num_attention_heads)
        module.attention_head_size = query.out_features // module.num_attention_heads
        if hasattr(module, "all_head_size"):
            module.all_head_size = query.out_features


CONTENDERS = {
    "cocktail": Contender(_grouping_cocktail, _slim_cocktail),
    "torch-pruning": Contender(_grouping_torch_pruning, _slim_torch_pruning),
}
