"""Routers of mixtures of experts: while a subnetwork is active, no token is given to an expert that it removes.

Zeros cannot say that: a router's row of zeros is a logit of 0, which may well be among the largest. A logit of -inf
never is, and neither softmax nor sigmoid gives it a share. So whatever the router's code does with its logits, it
computes what the router of a slim model computes, which has no rows for these experts.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ..errors import SubnetError
from ..graph import Coupling
from ..masks import Mask

__all__ = ["RouterGuard", "lift_routers"]


class RouterGuard:
    """Keeps tokens from the experts that the active subnetwork removes.

    ``forward`` of each router is hidden by an object that calls it, and is back when the guard is lifted. A forward
    hook would do the same, but ``torch.compile`` does not look whether hooks were added since it compiled a model
    (torch 2.14): a compiled model would go on giving tokens to removed experts. An attribute of the instance it sees.

    Args:
        model: The user's own.
        coupling: Its coupling.
    """

    def __init__(self, model: nn.Module, coupling: Coupling) -> None:
        names = {id(p): n for n, p in model.named_parameters()}
        self._routers: dict[str, tuple[nn.Module, str]] = {}
        for s in coupling.experts:
            module = model.get_submodule(s.module)
            own = {names.get(id(p)): at for at, p in module.named_parameters(remove_duplicate=False)}
            self._routers[s.name] = module, own[s.router]

    def arm(self, mask: Mask) -> None:
        """From now on, give no token to the experts that a mask removes."""
        for name, gone in mask.experts.items():
            if bool(gone.any()):
                module, weight = self._routers[name]
                device = module.get_parameter(weight).device
                module.__dict__["forward"] = _NeverRouted(module, weight, gone.to(device))

    def lift(self) -> None:
        """Let routers choose among all experts."""
        for module, _ in self._routers.values():
            _lift(module)


def lift_routers(model: nn.Module) -> None:
    """Let the routers of a copy choose among all of its experts."""
    for module in model.modules():
        _lift(module)


def _lift(module: nn.Module) -> None:
    hidden = module.__dict__.get("forward")
    if isinstance(hidden, _NeverRouted):
        del module.__dict__["forward"]
        if hidden.before is not None:
            module.__dict__["forward"] = hidden.before


class _NeverRouted:
    """Stands for the ``forward`` of one module that computes a router's logits. Copies belong to the module's copy.

    Args:
        module: The module.
        weight: Name of the router's weight in it.
        gone: For each expert whether it is removed, on the weight's device.
    """

    def __init__(self, module: nn.Module, weight: str, gone: Bool[Tensor, " experts"]) -> None:
        self.module, self.weight, self.gone = module, weight, gone
        self.before = module.__dict__.get("forward")  # accelerate hides it in the same way

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module = self.module
        weight = module.get_parameter(self.weight)
        mode = _MaskedLogits(weight, self.gone.to(weight.device))
        with mode:
            if self.before is not None:
                out = self.before(*args, **kwargs)
            else:
                out = type(module).forward(module, *args, **kwargs)
        if not mode.seen:
            raise SubnetError(
                f"the active subnetwork removes experts, but {type(module).__name__} did not compute the logits of its "
                f"router as F.linear(x, {self.weight}), as it did when the model was traced; use net.slim(...)"
            )
        return out


class _MaskedLogits(TorchFunctionMode):
    """While it is entered, the logits of removed experts are -inf. Modes are each thread's own.

    Args:
        weight: The router's weight, known by identity.
        gone: For each expert whether it is removed, on the weight's device.
    """

    def __init__(self, weight: Tensor, gone: Bool[Tensor, " experts"]) -> None:
        super().__init__()
        self.weight, self.gone, self.seen = weight, gone, False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func is F.linear and (args[1] if len(args) > 1 else kwargs["weight"]) is self.weight:
            self.seen = True
            out = out.masked_fill(self.gone, -torch.inf)
        return out
