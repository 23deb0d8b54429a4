"""A model together with its sparse subnetworks."""

from __future__ import annotations

import contextlib
import copy
import difflib
import logging
from collections.abc import Iterable, Iterator, Mapping
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from .counts import SubnetReport, nonzero_macs, params_kept
from .errors import PatternError, SubnetError
from .graph import Coupling, Weight
from .masks import Mask
from .patterns import DENSE, UMG, Pattern, Subnet, make_all_masks, resolve_patterns
from .selection import Modules, Selection
from .statistics import Forward, device_of, measure, statistics_of, to_device
from .switching import Switcher

log = logging.getLogger(__name__)

Example = tuple[tuple[Any, ...], dict[str, Any]]

_MASK_CACHE_BYTES = 1 << 30


class CocktailNet(nn.Module):
    """A dense network and its sparse subnetworks, which share its weights.

    Made by :func:`sparsify` and :func:`from_pretrained`. It behaves as the model does: calls and unknown attributes go
    to :attr:`model`, the user's own instance, whose tensors are changed in place by :meth:`switch`.

    While a subnetwork is active, ``net.model`` *is* that subnetwork: ``net.model.state_dict()`` holds its masked
    weights. ``net.state_dict()``, ``net.save_pretrained()`` and ``net.umg()`` always see the dense weights. Copies made by
    ``copy.deepcopy(net)`` have the same subnetwork active.

    Attributes:
        model: The user's own model.
        patterns: Its patterns, in the order given.
        coupling: What goes together when channels go.
        eligible: The weights that elementwise patterns may touch.
        selection: What the user targeted and excluded.
        example: ``(args, kwargs)`` on which the model was traced; ``None`` where a bundle could not describe them.
        metrics: A metric by subnet name, set by training or by the user, saved in bundles.
        statistics: Batch-norm means and variances by subnet name, each by the buffers' full names. Where a subnet has none,
            the dense network's are used. Those of ``"dense"`` are the model's own buffers; its entry here, if there is one,
            is a copy for reading.
    """

    model: nn.Module

    def __init__(
        self,
        model: nn.Module,
        patterns: tuple[Pattern, ...],
        coupling: Coupling,
        selection: Selection,
        example: Example | None,
        masks: Mapping[str, Mask],
    ) -> None:
        super().__init__()
        self.model = model
        self.patterns = patterns
        self.coupling = coupling
        self.selection = selection
        self.eligible: tuple[Weight, ...] = selection.eligible(coupling)
        self.example = example
        self.metrics: dict[str, float] = {}
        self.statistics: dict[str, dict[str, Tensor]] = {}
        self._subnets = {DENSE: Subnet(DENSE, DENSE, 0.0)} | {s.name: s for p in patterns for s in p.subnets()}
        self._masks: dict[str, Mask] = {}
        self._cache: dict[str, dict[str, Tensor]] = {}
        self._switcher = Switcher(model)
        self._active = self._statistics_active = DENSE
        self.training = model.training
        for name, mask in masks.items():
            self.set_mask(name, mask)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the active subnetwork."""
        return self.model(*args, **kwargs)

    # ------------------------------------------------------------------ names

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

    def subnet(self, name: str) -> Subnet:
        """The subnetwork of a name; numbers may be written loosely (``"channel@0.10"``).

        Raises:
            SubnetError: There is none.
        """
        if isinstance(name, str):
            if name in self._subnets:
                return self._subnets[name]
            loose = _loose(name)
            for known, s in self._subnets.items():
                if loose is not None and loose == _loose(known):
                    return s
        text = str(name)
        near = difflib.get_close_matches(text, self._subnets, n=3, cutoff=0.4) or list(self._subnets)[:3]
        raise SubnetError(
            f"no subnet {text!r}; nearest: {', '.join(near)} (net.names lists all {len(self._subnets)})"
        )

    def pattern(self, name: str) -> Pattern:
        """The pattern of a registered name.

        Raises:
            PatternError: The net has none of that name.
        """
        for p in self.patterns:
            if p.name == name:
                return p
        raise PatternError(f"this net has no pattern {name!r}; it has {', '.join(p.name for p in self.patterns)}")

    # -------------------------------------------------------------- switching

    def switch(self, name: str) -> CocktailNet:
        """Make a subnetwork the active one, in place.

        The model's own tensors are changed; their dense values are kept beside and restored bit for bit by
        ``switch("dense")``. Changes made meanwhile to tensors that the subnetwork masks, and to batch-norm buffers, are lost.

        Returns:
            The net itself.

        Raises:
            SubnetError: There is no such subnetwork, or it has no mask yet.
        """
        self._go(self._ready(name), statistics=True)
        if self._active == DENSE:
            self._switcher.release()
        return self

    @contextlib.contextmanager
    def using(self, name: str, *, statistics: bool = True) -> Iterator[CocktailNet]:
        """Make a subnetwork active for a while; may be nested.

        Whatever happens inside, on leaving the network that was active before is active again. Updates made inside to
        parameters that the subnetwork masks are discarded on leaving, so training steps its optimizer outside.

        Args:
            name: The subnetwork.
            statistics: Whether batch-norm buffers go with it. If not, they are neither swapped nor restored: training
                shares them.

        Raises:
            SubnetError: There is no such subnetwork, or it has no mask yet.
        """
        target = self._ready(name)
        before, statistics_before = self._active, self._statistics_active
        try:
            self._go(target, statistics=statistics)
            yield self
        finally:
            self._go(before, statistics=False)
            if statistics:
                self._go_statistics(statistics_before)

    def _ready(self, name: str) -> str:
        name = self.subnet(name).name
        if name != DENSE and name not in self._masks:
            raise SubnetError(f"subnet {name!r} has no mask yet: it is made in a later round of training (set_mask)")
        return name

    def _go(self, name: str, *, statistics: bool) -> None:
        if name != self._active:
            masks = {} if name == DENSE else self._device_masks(name)
            self._switcher.to_dense(statistics=False)
            self._active = DENSE  # true if what follows fails
            if masks:
                self._switcher.mask(masks)
            self._active = name
        if statistics:
            self._go_statistics(name)

    def _go_statistics(self, name: str) -> None:
        if name == self._statistics_active:
            return
        masks = {} if name == DENSE else self._device_masks(name)
        self._switcher.norms.restore(self._switcher.tensors)
        self._statistics_active = DENSE
        if name != DENSE:
            self._switcher.load_statistics(self.statistics.get(name, {}), masks)
        self._statistics_active = name

    # ------------------------------------------------------------------ masks

    def set_mask(self, name: str, mask: Mask) -> None:
        """Give a subnetwork its mask. Statistics and metric that belonged to another mask are dropped.

        Raises:
            SubnetError: There is no such subnetwork, it is the dense one, or a subnetwork is active.
            PatternError: The mask does not fit the model.
        """
        name = self.subnet(name).name
        if name == DENSE:
            raise SubnetError("the dense network has no mask")
        if self._active != DENSE or self._statistics_active != DENSE:
            raise SubnetError(f"masks change only while 'dense' is active; now {self._active!r} is: switch('dense') first")
        for weight, keep in mask.elements.items():
            shape = self.coupling.shapes.get(weight)
            if shape is None:
                raise PatternError(f"the mask of {name!r} is for {weight!r}, which is no parameter of the model")
            if keep.dtype != torch.bool or tuple(keep.shape) != tuple(shape):
                raise PatternError(
                    f"the mask of {name!r} for {weight!r} must be bool of shape {tuple(shape)}, not {keep.dtype} of "
                    f"{tuple(keep.shape)}"
                )
        if mask.removed is not None and (
            mask.removed.dtype != torch.bool or tuple(mask.removed.shape) != (self.coupling.n_units,)
        ):
            raise PatternError(
                f"the mask of {name!r} removes units given as {mask.removed.dtype} of {tuple(mask.removed.shape)}; the "
                f"model has {self.coupling.n_units} units, so bool of ({self.coupling.n_units},)"
            )
        removed = None if mask.removed is None else mask.removed.detach().cpu()
        self._masks[name] = Mask({n: k.detach().cpu() for n, k in mask.elements.items()}, removed)
        self._cache.pop(name, None)
        self.statistics.pop(name, None)
        self.metrics.pop(name, None)

    def mask_tensors(self, name: str) -> dict[str, Tensor]:
        """Masks of a subnetwork's parameters as numbers (1 kept, 0 masked), to mask gradients with.

        Returns:
            By parameter name, in the parameter's dtype and on its device, broadcastable to its shape. Parameters that the
            subnetwork leaves whole are left out. Cached: do not change them.

        Raises:
            SubnetError: There is no such subnetwork, or it has no mask yet.
        """
        name = self._ready(name)
        if name == DENSE:
            return {}
        return {n: m for n, m in self._device_masks(name).items() if n in self.coupling.shapes}

    def _device_masks(self, name: str) -> dict[str, Tensor]:
        tensors = self._switcher.tensors
        new = name not in self._cache
        masks = dict(self._masks[name].tensors(self.coupling)) if new else self._cache.pop(name)
        with torch.inference_mode(False):
            for n, m in masks.items():
                t = tensors[n]
                if m.dtype != t.dtype or m.device != t.device:  # new, or the model has moved
                    masks[n] = m.to(device=t.device, dtype=t.dtype)
        self._cache[name] = masks  # at the end: the dict's order is that of use
        if new:
            held = {k: sum(m.nbytes for m in v.values()) for k, v in self._cache.items()}
            for oldest in list(held)[:-1]:
                if sum(held.values()) <= _MASK_CACHE_BYTES:
                    break
                del self._cache[oldest], held[oldest]
        return masks

    def make_masks(self, subnet: Subnet | str, previous: Mask | None = None, made: Mapping[str, Mask] | None = None) -> Mask:
        """The mask that the subnet's pattern makes from the dense weights as they are now (UMG). It is not set.

        Args:
            subnet: The subnet or its name.
            previous: The pattern's mask of the level before; used by nested patterns.
            made: Masks of this round by other patterns, by pattern name.
        """
        s = self.subnet(subnet) if isinstance(subnet, str) else subnet
        pattern = self.pattern(s.pattern)
        return pattern.mask(s, self.umg(previous if pattern.nested else None, made))

    def umg(self, previous: Mask | None = None, made: Mapping[str, Mask] | None = None) -> UMG:
        """What a pattern sees of this net: the dense weights, whatever is active."""
        names = dict.fromkeys([*(w.name for w in self.eligible), *(p.weight for p in self.coupling.producers)])
        values = {n: self._switcher.dense(n) for n in names}
        return UMG(self.coupling, self.eligible, values, previous, dict(made or {}))

    def dense_tensor(self, name: str) -> Tensor:
        """A parameter's or buffer's dense value, whatever is active; the model's own memory, or the copy kept of it."""
        return self._switcher.dense(name)

    # ------------------------------------------------------------- statistics

    def recalibrate(self, name: str, batches: Iterable[Any], forward: Forward | None = None) -> None:
        """Measure a subnetwork's own batch-norm statistics and keep them in :attr:`statistics`.

        They are the exact average over the batches of each batch's mean and unbiased variance. Only batch norms train
        meanwhile; dropout and the like are off. The dense network's replace the model's buffers.

        Args:
            name: The subnetwork, or ``"dense"``.
            batches: Any iterable of batches, each weighing the same.
            forward: ``forward(model, batch)``; by default tensors, tuples that begin with the inputs, and dicts are
                understood.

        Raises:
            SubnetError: There is no such subnetwork.
            CocktailError: There are no batches.
        """
        name = self._ready(name)
        with self.using(DENSE):
            if name == DENSE:
                self._recalibrate_dense(batches, forward)
                return
            with self.using(name):
                measure(self.model, batches, forward)
                own = statistics_of(self.model)
            masks = self._device_masks(name)
            # What a removed channel measured means nothing; as zeros it need not be stored.
            self.statistics[name] = {n: v * masks[n] if n in masks else v for n, v in own.items()}

    def _recalibrate_dense(self, batches: Iterable[Any], forward: Forward | None) -> None:
        tensors = self._switcher.tensors
        before = {n: tensors[n].clone() for n in self._switcher.norm_buffers}
        try:
            measure(self.model, batches, forward)
        except BaseException:
            with torch.no_grad():
                for n, value in before.items():
                    tensors[n].copy_(value)
            raise
        self.statistics[DENSE] = statistics_of(self.model)

    # ------------------------------------------------------- reports and files

    def subnets(self) -> list[SubnetReport]:
        """Every subnetwork that has a mask, in numbers, in the order of :attr:`names`."""
        umg = self.umg()
        out = []
        for name, s in self._subnets.items():
            if name != DENSE and name not in self._masks:
                continue
            mask = self._masks.get(name, Mask())
            pattern = None if name == DENSE else self.pattern(s.pattern)
            out.append(
                SubnetReport(
                    name=name,
                    pattern=s.pattern,
                    sparsity=s.sparsity,
                    sparsity_exact=pattern.exact_sparsity(s, mask, umg) if pattern else 0.0,
                    params=params_kept(self.coupling, mask),
                    flops=self.coupling.flops(mask.removed),
                    nonzero_macs=nonzero_macs(self.coupling, mask),
                    metric=self.metrics.get(name),
                    coverage=pattern.coverage(s, umg) if pattern else 1.0,
                )
            )
        return out

    def slim(self, name: str) -> nn.Module:
        """A plain copy of the subnetwork with removed channels sliced away; checked to compute the same.

        Single masked weights stay as zeros in it.

        Raises:
            SubnetError: There is no such subnetwork.
            SlimError: It cannot be made, or computes something else.
        """
        from .slimming import slim_subnet

        return slim_subnet(self, self._ready(name))

    def save_pretrained(self, path: str | PathLike[str]) -> None:
        """Write the bundle: the dense weights once, packed masks, statistics, metrics. See :mod:`cocktailsdk.bundle`.

        Raises:
            BundleError: The folder holds something else, or a subnetwork has no mask yet.
        """
        from .bundle import save_pretrained

        save_pretrained(self, path)

    # ---------------------------------------------------------------- nn.Module

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As of any module, with the dense values, whatever is active."""
        state = super().state_dict(*args, **kwargs)
        prefix = kwargs.get("prefix", args[1] if len(args) > 1 else "")
        for stash in (self._switcher.weights, self._switcher.norms):
            for name, value in stash.saved.items():
                key = f"{prefix}model.{name}"
                if key in state:
                    state[key] = value.clone()
        return state

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As of any module; the values are the dense ones, whatever is active."""
        if self._active == DENSE and self._statistics_active == DENSE:
            return super().load_state_dict(*args, **kwargs)
        with self.using(DENSE):
            return super().load_state_dict(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            model = self.__dict__.get("_modules", {}).get("model")
            if model is None or name == "model":
                raise
            return getattr(model, name)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": {}}

    def __deepcopy__(self, memo: dict[int, Any]) -> CocktailNet:
        memo[id(self.coupling)] = self.coupling  # plain data that nobody changes, and as large as the graph
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        new.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return new

    def extra_repr(self) -> str:
        """The subnetworks, for ``repr``."""
        return f"{len(self._subnets)} networks, {self._active} active"


def sparsify(
    model: nn.Module,
    patterns: str | Pattern | Iterable[str | Pattern] = ("unstructured", "n:m", "channel"),
    example_inputs: Any = (),
    example_kwargs: Mapping[str, Any] | None = None,
    target_modules: Modules = None,
    exclude_modules: Modules = None,
) -> CocktailNet:
    """Find a model's sparse subnetworks: a mask for every pattern and level, from the weights as they are.

    It works at once, without training; :class:`CoTrainer` then trains all of them together. The model's weights are not
    changed.

    Args:
        model: Any module that ``torch.export`` can follow.
        patterns: Names (``"unstructured"``), spec strings (``"2:4"``, ``"channel@0.3"``) or pattern objects.
        example_inputs: Positional arguments of one forward pass (a single tensor is taken as one). Where none are given, an adapter
            is asked for them.
        example_kwargs: Keyword arguments of that pass.
        target_modules: Which modules are eligible: a regular expression over the whole path, or a list of names and suffixes.
            By default all convolution and linear weights but the first convolution and the classifier.
        exclude_modules: Which are not; the same forms. They also keep their output channels.

    Raises:
        PatternError: A pattern is not known, or a selection names nothing.
        AdapterError: No example inputs were given and none can be made.
        ExportFailed: The model cannot be followed on the example inputs.
    """
    if isinstance(model, CocktailNet):
        raise PatternError("the model is a CocktailNet already; give its .model to sparsify it anew")
    if not isinstance(model, nn.Module):
        raise PatternError(f"sparsify takes an nn.Module, not {type(model).__name__}")
    chosen = resolve_patterns(patterns)
    selection = Selection.of(model, target_modules, exclude_modules)
    example = example_of(model, example_inputs, example_kwargs)
    coupling = couple_model(model, example, selection)
    eligible = selection.eligible(coupling)
    if not eligible and not coupling.groups:
        raise PatternError(
            "nothing in the model can be pruned: no weight is eligible and no channels can go; the first convolution and "
            "the classifier become eligible when target_modules names them"
        )
    net = CocktailNet(model, chosen, coupling, selection, example, {})
    umg = net.umg()
    for name, mask in make_all_masks(chosen, coupling, eligible, umg.values).items():
        net.set_mask(name, mask)
    log.info("%d networks of %s: %d eligible weights, %d channel groups", len(net.names), type(model).__name__,
             len(eligible), len(coupling.groups))
    return net


def example_of(model: nn.Module, inputs: Any = (), kwargs: Mapping[str, Any] | None = None) -> Example:
    """Example inputs as ``(args, kwargs)``: those given, or else an adapter's.

    Raises:
        AdapterError: None were given and no adapter knows the model.
    """
    if isinstance(inputs, Tensor):
        inputs = (inputs,)
    elif not isinstance(inputs, list | tuple):
        raise PatternError(f"example_inputs must be a tuple of the model's arguments, not {type(inputs).__name__}")
    if inputs or kwargs:
        return tuple(inputs), dict(kwargs or {})
    from .adapters import example_inputs_for

    args, found = example_inputs_for(model)
    return tuple(args), dict(found)


def couple_model(model: nn.Module, example: Example, selection: Selection) -> Coupling:
    """The model's coupling, on its own device."""
    from .graph import couple

    args, kwargs = to_device(example, device_of(model))
    return couple(model, args, kwargs, exclude=selection.keeps_channels if selection.whole else None)


def _loose(name: str) -> tuple[str, float] | None:
    pattern, at, level = name.partition("@")
    if not at:
        return None
    try:
        return pattern.strip(), round(float(level), 3)
    except ValueError:
        return None
