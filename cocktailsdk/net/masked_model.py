"""A model, its subnetworks, and their masks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

import torch
from torch import Tensor, nn

from ..errors import PatternError, SubnetError
from ..graph import Coupling
from ..masks import Mask
from ..masks.device_cache import DeviceMaskCache, DeviceMasks, mask_bytes, zero_masked
from ..masks.packed import Level, PackedMasks, nested_levels
from ..patterns import DENSE, Subnet
from ..utils.fsdp import local
from ..utils.nearest import loose, no_subnet
from .private import check_private, private_copies
from .switcher import Switcher
from .target_modules import owner_of

__all__ = ["MaskedModel"]


class MaskedModel(nn.Module):
    """A model, and the masks, statistics and private tensors of its subnetworks.

    Args:
        model: The user's own.
        coupling: Its coupling.
        subnets: Its subnetworks, the dense network apart.

    Attributes:
        model: The user's own model.
        coupling: Which units go together when channels are removed.
        metrics: A metric by subnet name.
        statistics: Batch-norm means and variances by subnet name.
    """

    model: nn.Module

    def __init__(self, model: nn.Module, coupling: Coupling, subnets: Sequence[Subnet]) -> None:
        super().__init__()
        self.model = model
        self.coupling = coupling
        self.metrics: dict[str, float] = {}
        self.statistics: dict[str, dict[str, Tensor]] = {}
        self._subnets = {DENSE: Subnet(DENSE, DENSE, 0.0)} | {s.name: s for s in subnets}
        self._masks: dict[str, Mask] = {}
        self._private: dict[str, dict[str, Tensor]] = {}
        self._switcher = Switcher(model)
        self._mask_cache = DeviceMaskCache(coupling, self._switcher.tensors)
        # The two differ while masked training shares one network's statistics: using(name, statistics=False).
        self._active = self._statistics_active = DENSE

    @property
    def names(self) -> list[str]:
        """Names of all subnetworks: ``"dense"``, then by pattern."""
        return list(self._subnets)

    @property
    def active(self) -> str:
        """Name of the active subnetwork."""
        return self._active

    @property
    def masks(self) -> Mapping[str, Mask]:
        """Masks by subnet name, on the CPU; the dense network has none. Change them with :meth:`set_mask`."""
        return dict(self._masks)

    @property
    def private(self) -> Mapping[str, Mapping[str, Tensor]]:
        """Parameters' values that a subnetwork owns, by subnet name and parameter name: a classifier head, for example.

        While the subnetwork is active, they are in the place of the dense network's values. Change them with
        :meth:`set_private`.
        """
        return MappingProxyType({name: MappingProxyType(own) for name, own in self._private.items()})

    def subnet(self, name: str) -> Subnet:
        """The subnetwork of a name; numbers may be written loosely (``"channel@0.10"``).

        Raises:
            SubnetError: There is none.
        """
        if isinstance(name, str):
            if name in self._subnets:
                return self._subnets[name]
            wanted = loose(name)
            for known, s in self._subnets.items():
                if wanted is not None and wanted == loose(known):
                    return s
        raise SubnetError(no_subnet(name, self.names))

    def _check_structure(self) -> None:
        """Check that the model still has the modules and parameters that it had.

        Raises:
            CocktailError: Modules or parameters were added, removed or replaced; says which.
        """
        self._switcher.tensors.check()

    def _require_mask(self, name: str) -> str:
        """The full name of a subnetwork that can be active.

        Raises:
            SubnetError: There is no such subnetwork, or it has no mask yet.
            CocktailError: Modules or parameters of the model were added, removed or replaced.
        """
        self._check_structure()
        name = self.subnet(name).name
        if name != DENSE and name not in self._masks:
            raise SubnetError(f"subnet {name!r} has no mask yet: it is made in a later round of training (set_mask)")
        return name

    def set_mask(self, name: str, mask: Mask) -> None:
        """Give a subnetwork its mask. Statistics, private tensors and metric of another mask are dropped.

        Raises:
            SubnetError: There is no such subnetwork, it is the dense one, or a subnetwork is active.
            PatternError: The mask does not fit the model.
        """
        name = self.subnet(name).name
        if name == DENSE:
            raise SubnetError("the dense network has no mask")
        self._require_dense("masks")
        _check_fits(name, mask, self.coupling)
        _check_scales(name, mask, self.coupling)
        removed = None if mask.removed is None else mask.removed.detach().cpu()
        experts = {n: gone.detach().cpu() for n, gone in mask.experts.items()}
        self._masks[name] = Mask(PackedMasks((n, k.cpu()) for n, k in mask.elements.items()), removed, experts)
        self._mask_cache.forget(name)
        self._switcher.forget([name])
        self.statistics.pop(name, None)
        self._private.pop(name, None)
        self.metrics.pop(name, None)
        self._nest_masks(self._subnets[name].pattern)

    def set_private(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Give a subnetwork its own values of some parameters; they replace those that it had.

        They are copied. What the subnetwork's mask masks is 0 in the copies. The metric that was measured without them
        is dropped. Batch-norm statistics stay: call :meth:`SubnetModel.recalibrate` if the private tensors change what
        a norm receives. The dense network's values, and those of all other subnetworks, do not change.

        :class:`CoTrainer` and :class:`CoLoop` remove all private tensors before they train: the gradient of a pass with
        them would go to the dense parameters.

        Args:
            name: The subnetwork.
            tensors: By parameter name, of the parameter's shape and dtype. An empty mapping removes all.

        Raises:
            SubnetError: There is no such subnetwork, it is the dense one, it has no mask yet, or a subnetwork is
                active. Or a tensor fits no parameter, or the parameter is tied to another or sharded (FSDP2).
            CocktailError: Modules or parameters of the model were added, removed or replaced.
        """
        name = self._require_mask(name)
        if name == DENSE:
            raise SubnetError("the dense network has no private tensors: its values are the model's own parameters")
        self._require_dense("private tensors")
        table = self._switcher.tensors
        check_private(name, tensors, table, self.coupling)
        if tensors or name in self._private:
            self._switcher.forget([name])
            self._private.pop(name, None)
            self.metrics.pop(name, None)
        if tensors:
            self._private[name] = private_copies(tensors, self._masks[name], table, self.coupling)

    def _drop_private(self) -> None:
        """Remove all private tensors: training begins without any, and their gradients would be the dense weights'."""
        for name in list(self._private):
            self.set_private(name, {})

    def _require_dense(self, what: str) -> None:
        if self._active != DENSE or self._statistics_active != DENSE:
            raise SubnetError(
                f"{what} change only while 'dense' is active; now {self._active!r} is: switch('dense') first"
            )

    def _nest_masks(self, pattern: str) -> None:
        """Once a pattern has all its masks of single weights, store nested ones together, in fewer bits."""
        names = [n for n, s in self._subnets.items() if s.pattern == pattern]
        masks = [self._masks.get(n) for n in names]
        elements = [m.elements for m in masks if m is not None and m.elements]
        if len(elements) == len(names) > 2:
            levels = nested_levels([e.packed() for e in elements if isinstance(e, Level | PackedMasks)])
            for name, level in zip(names, levels or (), strict=False):
                self._masks[name] = replace(self._masks[name], elements=level)

    def mask_tensors(self, name: str) -> dict[str, Tensor]:
        """Masks of a subnetwork's parameters as numbers: 1 kept, 0 masked. They are as large as the parameters.

        Returns:
            By parameter name, in the parameter's dtype and on its device, broadcastable to its shape. Parameters that
            the subnetwork does not mask are missing. Do not change them.

        Raises:
            SubnetError: There is no such subnetwork, or it has no mask yet.
        """
        name = self._require_mask(name)
        if name == DENSE:
            return {}
        tensors, masks = self._switcher.tensors, self._device_masks(name)
        return {n: masks[n].to(tensors[n].dtype) for n in masks if n in self.coupling.shapes}

    def masked_parameters(self, name: str) -> list[str]:
        """Names of the parameters that a subnetwork masks.

        Raises:
            SubnetError: There is no such subnetwork, or it has no mask yet.
        """
        name = self._require_mask(name)
        return [] if name == DENSE else [n for n in self._device_masks(name) if n in self.coupling.shapes]

    def zero_masked(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Set to zero, in place, what a subnetwork masks: of gradients, for example.

        Args:
            name: The subnetwork.
            tensors: Shaped like the parameters, by their names. Those that the subnetwork does not mask do not change.

        Raises:
            SubnetError: There is no such subnetwork, or it has no mask yet.
        """
        name = self._require_mask(name)
        if name != DENSE:
            masks = self._device_masks(name)
            zero_masked(masks, {n: local(t) for n, t in tensors.items() if n in masks})

    def mask_bytes(self, name: str) -> int:
        """Bytes that a subnetwork's masks take on the model's device, besides those of :attr:`masks` on the CPU.

        Raises:
            SubnetError: There is no such subnetwork, or it has no mask yet.
        """
        name = self._require_mask(name)
        return 0 if name == DENSE else mask_bytes(self._device_masks(name))

    def _device_masks(self, name: str) -> DeviceMasks:
        """A subnetwork's masks on the model's device."""
        return self._mask_cache.of(name, self._masks[name])

    def _norm_masks(self, name: str) -> DeviceMasks:
        """Masks that include those of batch-norm buffers; empty where a subnetwork masks none of these."""
        mask = self._masks[name]
        if mask.removed is None and self._switcher.norm_buffers.isdisjoint(mask.elements):
            return {}
        return self._device_masks(name)


def _check_fits(name: str, mask: Mask, coupling: Coupling) -> None:
    """Check a mask's names, shapes and dtypes against the model.

    Raises:
        PatternError: It does not fit.
    """
    for weight, keep in mask.elements.items():
        shape = coupling.shapes.get(weight)
        if shape is None:
            raise PatternError(f"the mask of {name!r} is for {weight!r}, which is no parameter of the model")
        if keep.dtype != torch.bool or tuple(keep.shape) != tuple(shape):
            raise PatternError(
                f"the mask of {name!r} for {weight!r} must be bool of shape {tuple(shape)}, not {keep.dtype} of "
                f"{tuple(keep.shape)}"
            )
    if mask.removed is not None and (
        mask.removed.dtype != torch.bool or tuple(mask.removed.shape) != (coupling.n_units,)
    ):
        raise PatternError(
            f"the mask of {name!r} removes units given as {mask.removed.dtype} of {tuple(mask.removed.shape)}; the "
            f"model has {coupling.n_units} units, so bool of ({coupling.n_units},)"
        )
    sets = {s.name: s for s in coupling.experts}
    for at, gone in mask.experts.items():
        if at not in sets:
            raise PatternError(f"the mask of {name!r} removes experts of {at!r}, where the model has no such experts")
        found = sets[at]
        if gone.dtype != torch.bool or tuple(gone.shape) != (found.count,):
            raise PatternError(
                f"the mask of {name!r} removes experts of {at!r} given as {gone.dtype} of {tuple(gone.shape)}; there "
                f"are {found.count}, so bool of ({found.count},)"
            )
        if found.count - int(gone.sum()) < found.top_k:
            raise PatternError(
                f"the mask of {name!r} leaves {found.count - int(gone.sum())} experts of {at!r}, and each token is "
                f"given to {found.top_k}; remove at most {found.count - found.top_k}"
            )


def _check_scales(name: str, mask: Mask, coupling: Coupling) -> None:
    """Refuse masks under which a normalized weight (weight norm, spectral norm) would be 0 / 0.

    Raises:
        PatternError: It is such a mask; names the weight.
    """
    for weight, scale in coupling.scales.items():
        keep = mask.elements.get(weight)
        if keep is None or scale.name:
            continue
        nonzero = keep.any() if scale.axis is None else keep.movedim(scale.axis, 0).flatten(1).any(1).all()
        if not bool(nonzero):
            part = "all" if scale.axis is None else "whole channels"
            module = weight.partition(".parametrizations.")[0] if ".parametr" in weight else owner_of(weight)
            raise PatternError(
                f"the mask of {name!r} removes {part} of {weight!r}, which the model divides by a norm of its own: "
                f"the weight would be 0 / 0; give exclude_modules=[{module!r}], or a lower sparsity"
            )
