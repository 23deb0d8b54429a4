"""A module whose tensors become those of one subnetwork or another, in place."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor, nn

from ..errors import CocktailError, PatternError, SubnetError
from ..graph import Coupling
from ..graph.hook_weights import refresh_hook_weights
from ..masks import Mask
from ..masks.device_cache import Placed, PlacedMasks, placed_bytes, zero_masked
from ..masks.nested import Level, nested_levels
from ..masks.packed import PackedMasks
from ..patterns import DENSE, Subnet
from ..utils.batchnorm import statistics_of
from ..utils.fsdp import local
from ..utils.nearest import loose, no_subnet
from ..utils.undo import unchanged
from ..utils.weight_caches import forget_derived
from .rwlock import Gate
from .switcher import Switcher
from .target_modules import owner_of, some_of
from .tuners import MergeGuard, adapter_caches

Changes = Literal["refuse", "keep", "discard"]
"""What is done with values that were written into a subnetwork's tensors while it was active."""


@contextlib.contextmanager
def model_unchanged(net: SwitchableModel, *, watch: bool = True) -> Iterator[None]:
    """:func:`~cocktailsdk.utils.undo.unchanged` for a net's model, while subnetworks of it may be switched.

    Tensors that switching gives other values or memory are left alone: the net restores these.

    Raises:
        CocktailError: The model has other modules or parameters than it had.
    """
    net._same_model()
    tensors = net._switcher.tensors
    names = {*net.coupling.fields, *net.coupling.shapes, *net._switcher.norm_buffers}
    with unchanged(net.model, but=[tensors.given(name) for name in names if name in tensors], watch=watch):
        yield


class SwitchableModel(nn.Module):
    """A model, the masks and statistics of its subnetworks, and which of them is active.

    Threads may use one net together: a forward pass sees one subnetwork from start to end, since :meth:`switch` and
    :meth:`using` wait until those that run are done, and those that come meanwhile wait for them. That holds for calls
    of the net itself; whoever calls :attr:`model` or its other methods (``net.generate``) does so within
    ``with net.hold():`` or ``with net.using(name):``.

    Attributes:
        model: The user's own model.
        coupling: What goes together when channels go.
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
        self._switcher = Switcher(model)
        self._placed = PlacedMasks(coupling, self._switcher.tensors)
        self._gate = Gate()
        self._hooked = tuple(m for m in model.modules() if m._forward_pre_hooks)
        self._merges = MergeGuard(model)
        self._adapter_caches = adapter_caches(model)
        self._active = self._statistics_active = DENSE
        self.training = model.training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the active subnetwork."""
        if _without_waiting(self):
            return self.model(*args, **kwargs)
        with self._gate.reading():
            return self.model(*args, **kwargs)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """As of any module: compiles :attr:`model`, in place. Switching does not compile it again."""
        self.model.compile(*args, **kwargs)

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
            wanted = loose(name)
            for known, s in self._subnets.items():
                if wanted is not None and wanted == loose(known):
                    return s
        raise SubnetError(no_subnet(name, self.names))

    def switch(self, name: str, *, changes: Changes = "refuse") -> Self:
        """Make a subnetwork the active one, in place.

        The model's own tensors are changed; their dense values are kept beside and restored bit for bit by
        ``switch("dense")``. Waits for forward passes that other threads run; see :meth:`prepare` for a switch that
        takes no time.

        Args:
            name: The subnetwork.
            changes: What is done where somebody has changed tensors that the active subnetwork masks, or norms'
                buffers, since it became active (``load_state_dict``, an optimizer's step, ``copy_``): ``"refuse"`` the
                switch, ``"keep"`` their values as they are now for the dense network's, zeros included, or
                ``"discard"`` them. What forward passes in train mode make of running statistics is no such change: the
                subnetwork keeps it in :attr:`statistics`.

        Returns:
            The net itself.

        Raises:
            SubnetError: There is no such subnetwork, it has no mask yet, this thread is in a forward pass or holds the
                active one, or tensors were changed while the active one was.
            CocktailError: Modules or parameters of the model were added, removed or replaced.
        """
        name, changes = self._ready(name), _checked(changes)
        with self._gate.alone():
            self._settle(name, name, changes)
            self._go(name, name)
            self._placed.release()
            if self._active == DENSE:
                self._switcher.release()
        return self

    def prepare(self, *names: str) -> Self:
        """Make subnetworks' weights and statistics now, so that switching to these is a matter of microseconds.

        Each takes as much memory as the tensors that it masks, one copy of the model at most, until others are prepared
        in its place; ``prepare()`` forgets all. Forward passes of other threads go on meanwhile. Once the dense weights
        or :attr:`statistics` change, the copies are not used any more (a change through ``.data`` is not noticed:
        prepare anew).

        It is of use for models on the CPU, where making a subnetwork's weights takes about as long as loading them.
        Elsewhere only the masks are brought to the model.

        Returns:
            The net itself.

        Raises:
            SubnetError: There is no such subnetwork, or it has no mask yet.
        """
        wanted = dict.fromkeys(self._ready(name) for name in names)
        with self._gate.changing():
            self._switcher.forget(self._switcher.prepared.keys() - wanted.keys())
            for name in wanted:
                if name != DENSE:
                    self._switcher.prepare(name, self._device_masks(name), self.statistics.get(name, {}))
            self._placed.release()
        return self

    @property
    def prepared(self) -> list[str]:
        """Names of the subnetworks that are ready; see :meth:`prepare`."""
        return [name for name in self._subnets if self._switcher.ready(name) is not None]

    @contextlib.contextmanager
    def hold(self) -> Iterator[str]:
        """For a while, let no other thread switch: for requests that are more than one call of the net.

        Any number of threads may hold the active subnetwork at once; a switch waits for all of them.

        Yields:
            Its name.
        """
        with self._gate.reading():
            yield self._active

    @contextlib.contextmanager
    def using(self, name: str, *, statistics: bool = True, changes: Changes = "refuse") -> Iterator[Self]:
        """Make a subnetwork active for a while; may be nested.

        Whatever happens inside, on leaving the network that was active before is active again. Training steps its
        optimizer outside: an update made inside to a parameter that the subnetwork masks is dropped on leaving, with an
        error that says so. Other threads' forward passes wait until then.

        Args:
            name: The subnetwork.
            statistics: Whether batch-norm buffers go with it. If not, they are neither swapped nor restored: training
                shares them.
            changes: As for :meth:`switch`, for what is changed inside; after an exception inside, changes are dropped.

        Raises:
            SubnetError: There is no such subnetwork, it has no mask yet, this thread is in a forward pass or holds the
                active one, or tensors were changed inside or before.
            CocktailError: Modules or parameters of the model were added, removed or replaced.
        """
        target, changes = self._ready(name), _checked(changes)
        with self._gate.alone():
            before, statistics_before = self._active, self._statistics_active if statistics else None
            self._settle(target, target if statistics else None, "refuse")
            try:
                self._go(target, target if statistics else None, watch=changes != "discard")
                yield self
            except BaseException:
                with contextlib.suppress(CocktailError):  # the model was changed: the dense network is active then
                    self._settle(before, statistics_before, "discard", inside=True)
                    self._go(before, statistics_before)
                raise
            self._leave(before, statistics_before, changes)

    def _leave(self, name: str, statistics: str | None, changes: Changes) -> None:
        try:
            self._settle(name, statistics, changes, inside=True)
        finally:
            with contextlib.suppress(CocktailError):
                self._same_model()
                self._go(name, statistics)

    def _ready(self, name: str) -> str:
        self._same_model()
        name = self.subnet(name).name
        if name != DENSE and name not in self._masks:
            raise SubnetError(f"subnet {name!r} has no mask yet: it is made in a later round of training (set_mask)")
        return name

    def _same_model(self) -> None:
        """See that the model still has the modules and parameters that it had.

        Raises:
            CocktailError: It has not. The dense network is active then, in the tensors that were changed.
        """
        try:
            self._switcher.tensors.check()
        except CocktailError:
            if self._active != DENSE or self._statistics_active != DENSE:
                with self._gate.alone():
                    active = self._masks.get(self._active, Mask())
                    self._switcher.abandon(active.tensors(self.coupling))
                    self._merges.lift()
                    self._active = self._statistics_active = DENSE
            raise

    def _settle(self, name: str, statistics: str | None, changes: Changes, *, inside: bool = False) -> None:
        """See what somebody has changed in the active network, before another takes its place.

        Args:
            name: The network that is to be active.
            statistics: The one whose statistics are to be; ``None`` where they stay.
            changes: As for :meth:`switch`.
            inside: Whether it was changed inside :meth:`using`, which ends.

        Raises:
            SubnetError: Tensors were changed, and that is to be refused.
        """
        if inside:
            self._same_model()
        switcher, active = self._switcher, self._active
        switcher.weights.doubt()
        switcher.norms.doubt()
        if changes == "discard":
            if name != active and switcher.weights.swapped and not switcher.weights.untouched():
                switcher.forget([active])
            return
        weights: list[str] = []
        if name != active and not switcher.weights.untouched():
            switcher.forget([active])  # what was prepared of it is what somebody has written
            weights = switcher.changed_weights(self._device_masks(active))
        buffers: list[str] = []
        moved = False
        own = self._statistics_active
        if statistics not in (None, own) and not switcher.norms.untouched():
            changed = switcher.changed_statistics(self.statistics.get(own, {}), self._norm_masks(own))
            buffers = [n for n in changed if not switcher.trained_statistics(n.rpartition(".")[0])]
            moved = len(buffers) < len(changed)
        if (weights or buffers) and changes == "refuse":
            raise _changed([*weights, *buffers], active if weights else own, name, inside)
        if weights or buffers:
            switcher.become_dense(weights, buffers)
        if moved:
            self.statistics[own] = {n: t for n, t in statistics_of(self.model).items() if n not in buffers}

    def _refuse_changed(self) -> None:
        """Before the dense values are read: see that none were changed while a subnetwork is active.

        Raises:
            SubnetError: Some were.
        """
        if self._active != DENSE:
            self._settle(DENSE, None, "refuse")

    def _go(self, name: str, statistics: str | None, *, watch: bool = True) -> None:
        """Make a network active, and the statistics of one; ``None`` leaves these as they are."""
        switcher = self._switcher
        if name != self._active:
            masks = {} if name == DENSE or name in switcher.prepared else self._device_masks(name)
            switcher.to_dense(statistics=False)
            self._merges.lift()
            self._active = DENSE  # true if what follows fails
            if name != DENSE and not switcher.swap(name):
                switcher.mask(masks or self._device_masks(name))
            self._active = name
            for cache in self._adapter_caches:
                cache.clear()
            refresh_hook_weights(self._hooked)  # whoever looks at a weight before the next pass sees this subnetwork's
            if name != DENSE:
                self._merges.arm(name)
            if watch:
                switcher.weights.watch(switcher.tensors)
        if statistics not in (None, self._statistics_active):
            self._go_statistics(statistics)
            if watch:
                switcher.norms.watch(switcher.tensors)

    def _go_statistics(self, name: str) -> None:
        self._switcher.dense_statistics()
        self._statistics_active = DENSE
        if name != DENSE:
            own = self.statistics.get(name, {})
            if not self._switcher.swap_statistics(name, own):
                self._switcher.load_statistics(own, self._norm_masks(name))
        self._statistics_active = name

    def _norm_masks(self, name: str) -> Placed:
        """Masks among which are those of the batch-norm buffers."""
        mask = self._masks[name]
        if mask.removed is None and self._switcher.norm_buffers.isdisjoint(mask.elements):
            return {}
        return self._device_masks(name)

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
            raise SubnetError(
                f"masks change only while 'dense' is active; now {self._active!r} is: switch('dense') first"
            )
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
        self._check_scales(name, mask)
        removed = None if mask.removed is None else mask.removed.detach().cpu()
        self._masks[name] = Mask(PackedMasks((n, k.cpu()) for n, k in mask.elements.items()), removed)
        self._placed.forget(name)
        self._switcher.forget([name])
        self.statistics.pop(name, None)
        self.metrics.pop(name, None)
        self._hold_together(self._subnets[name].pattern)

    def _check_scales(self, name: str, mask: Mask) -> None:
        """Refuses masks under which a weight would be 0 / 0."""
        for weight, scale in self.coupling.scales.items():
            keep = mask.elements.get(weight)
            if keep is None or scale.name:
                continue
            left = keep.any() if scale.axis is None else keep.movedim(scale.axis, 0).flatten(1).any(1).all()
            if not bool(left):
                part = "all" if scale.axis is None else "whole channels"
                module = weight.partition(".parametrizations.")[0] if ".parametr" in weight else owner_of(weight)
                raise PatternError(
                    f"the mask of {name!r} removes {part} of {weight!r}, which the model divides by a norm of its own: "
                    f"the weight would be 0 / 0; give exclude_modules=[{module!r}], or a lower sparsity"
                )

    def _hold_together(self, pattern: str) -> None:
        """Once a pattern has all its masks of single weights, keep nested ones in fewer bits."""
        names = [n for n, s in self._subnets.items() if s.pattern == pattern]
        masks = [self._masks.get(n) for n in names]
        elements = [m.elements for m in masks if m is not None and m.elements]
        if len(elements) == len(names) > 2:
            packed = [e.packed() if isinstance(e, Level) else e for e in elements]
            levels = nested_levels([e for e in packed if isinstance(e, PackedMasks)])
            for name, level in zip(names, levels or (), strict=False):
                self._masks[name] = Mask(level, self._masks[name].removed)

    def mask_tensors(self, name: str) -> dict[str, Tensor]:
        """Masks of a subnetwork's parameters as numbers: 1 kept, 0 masked. They are as large as the parameters.

        Returns:
            By parameter name, in the parameter's dtype and on its device, broadcastable to its shape. Parameters that
            the subnetwork leaves whole are left out. Do not change them.

        Raises:
            SubnetError: There is no such subnetwork, or it has no mask yet.
        """
        name = self._ready(name)
        if name == DENSE:
            return {}
        tensors, masks = self._switcher.tensors, self._device_masks(name)
        return {n: masks[n].to(tensors[n].dtype) for n in masks if n in self.coupling.shapes}

    def masked_parameters(self, name: str) -> list[str]:
        """Names of the parameters that a subnetwork masks.

        Raises:
            SubnetError: There is no such subnetwork, or it has no mask yet.
        """
        name = self._ready(name)
        return [] if name == DENSE else [n for n in self._device_masks(name) if n in self.coupling.shapes]

    def zero_masked(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Set to zero, in place, what a subnetwork masks: of gradients, say.

        Args:
            name: The subnetwork.
            tensors: Like the parameters, by their names; those that it leaves whole are left alone.

        Raises:
            SubnetError: There is no such subnetwork, or it has no mask yet.
        """
        name = self._ready(name)
        if name != DENSE:
            masks = self._device_masks(name)
            zero_masked(masks, {n: local(t) for n, t in tensors.items() if n in masks})

    def mask_bytes(self, name: str) -> int:
        """Bytes that a subnetwork's masks take where the model is, besides those of :attr:`masks` on the CPU.

        Raises:
            SubnetError: There is no such subnetwork, or it has no mask yet.
        """
        name = self._ready(name)
        return 0 if name == DENSE else placed_bytes(self._device_masks(name))

    def _device_masks(self, name: str) -> Placed:
        return self._placed.of(name, self._masks[name])

    def dense_tensor(self, name: str) -> Tensor:
        """A parameter's or buffer's dense value, whatever is active; the model's own memory, or the copy kept of it.

        Of a sharded parameter (FSDP2) it is gathered whole: all processes must ask for it.
        """
        self._same_model()
        self._refuse_changed()
        return self._switcher.dense(name)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As of any module, with the dense values, whatever is active."""
        prefix = kwargs.get("prefix", args[1] if len(args) > 1 else "")
        self._same_model()
        self._refuse_changed()
        with self._gate.reading():
            state = super().state_dict(*args, **kwargs)
            for stash in (self._switcher.weights, self._switcher.norms):
                for name, value in stash.saved.items():
                    key = f"{prefix}model.{name}"
                    if key in state:
                        state[key] = value.clone()
        return state

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As of any module; the values are the dense ones, whatever is active."""
        with self.using(DENSE):
            try:
                return super().load_state_dict(*args, **kwargs)
            finally:
                forget_derived()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            model = self.__dict__.get("_modules", {}).get("model")
            if model is None or name == "model":
                raise
            return getattr(model, name)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        memo[id(self.coupling)] = self.coupling  # plain data that nobody changes, and as large as the graph
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        new.__setstate__(copy.deepcopy(self.__dict__, memo))
        if new._active != DENSE:
            new._merges.arm(new._active)
        return new

    def extra_repr(self) -> str:
        """The subnetworks, for ``repr``."""
        return f"{len(self._subnets)} networks, {self._active} active"


def _without_waiting(net: SwitchableModel) -> bool:
    """Whether a forward pass belongs to something that has the net to itself: tracing, or another call's backward pass.

    Checkpointed code runs again in the threads of the backward pass, while whoever asked for that waits.
    """
    if torch.compiler.is_compiling():
        return True
    return torch._C._current_graph_task_id() != -1 or getattr(net, "_is_replica", False)


def _checked(changes: Changes) -> Changes:
    if changes not in get_args(Changes):
        raise SubnetError(f'changes must be "refuse", "keep" or "discard", got {changes!r}')
    return changes


def _changed(names: Sequence[str], active: str, wanted: str, inside: bool) -> SubnetError:
    """The error for tensors that somebody changed while a subnetwork was active."""
    what = f"{some_of(names, 3)} changed while {active!r} was active, which masks them or has statistics of its own"
    if inside:
        return SubnetError(
            f"{what}: the changes were dropped when `using({active!r})` ended. Change weights (optimizer.step(), "
            f"load_state_dict) after it, or keep them for the dense network's: `net.using({active!r}, changes='keep')`"
        )
    return SubnetError(
        f"{what}: a switch would lose that. Keep the values as they are now for the dense network's, "
        f"net.switch({wanted!r}, changes='keep'), or drop them, changes='discard'. Another time, switch('dense') first"
    )
