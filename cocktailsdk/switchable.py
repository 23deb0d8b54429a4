"""A module whose tensors become those of one subnetwork or another, in place."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from .errors import PatternError, SubnetError
from .gate import Gate
from .graph import Coupling
from .levels import Level, nested_levels
from .masks import Mask
from .nearest import loose, no_subnet
from .packed import PackedMasks
from .patterns import DENSE, Subnet
from .placed import Placed, PlacedMasks, placed_bytes, zero_masked
from .sharding import local
from .switching import Switcher


class SwitchableNet(nn.Module):
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

    def switch(self, name: str) -> Self:
        """Make a subnetwork the active one, in place.

        The model's own tensors are changed; their dense values are kept beside and restored bit for bit by
        ``switch("dense")``. Changes made meanwhile to tensors that the subnetwork masks, and to batch-norm buffers,
        are lost. Waits for forward passes that other threads run; see :meth:`prepare` for a switch that takes no time.

        Returns:
            The net itself.

        Raises:
            SubnetError: There is no such subnetwork, it has no mask yet, or this thread is in a forward pass or holds
                the active one.
        """
        name = self._ready(name)
        with self._gate.alone():
            self._go(name, statistics=True)
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
    def using(self, name: str, *, statistics: bool = True) -> Iterator[Self]:
        """Make a subnetwork active for a while; may be nested.

        Whatever happens inside, on leaving the network that was active before is active again. Updates made inside to
        parameters that the subnetwork masks are discarded on leaving, so training steps its optimizer outside. Other
        threads' forward passes wait until then.

        Args:
            name: The subnetwork.
            statistics: Whether batch-norm buffers go with it. If not, they are neither swapped nor restored: training
                shares them.

        Raises:
            SubnetError: There is no such subnetwork, it has no mask yet, or this thread is in a forward pass or holds
                the active one.
        """
        target = self._ready(name)
        with self._gate.alone():
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
            masks = {} if name == DENSE or name in self._switcher.prepared else self._device_masks(name)
            self._switcher.to_dense(statistics=False)
            self._active = DENSE  # true if what follows fails
            if name != DENSE and not self._switcher.swap(name):
                self._switcher.mask(masks or self._device_masks(name))
            self._active = name
        if statistics:
            self._go_statistics(name)

    def _go_statistics(self, name: str) -> None:
        if name == self._statistics_active:
            return
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
        removed = None if mask.removed is None else mask.removed.detach().cpu()
        self._masks[name] = Mask(PackedMasks((n, k.cpu()) for n, k in mask.elements.items()), removed)
        self._placed.forget(name)
        self._switcher.forget([name])
        self.statistics.pop(name, None)
        self.metrics.pop(name, None)
        self._hold_together(self._subnets[name].pattern)

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
        return self._switcher.dense(name)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As of any module, with the dense values, whatever is active."""
        prefix = kwargs.get("prefix", args[1] if len(args) > 1 else "")
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
            return super().load_state_dict(*args, **kwargs)

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
        return new

    def extra_repr(self) -> str:
        """The subnetworks, for ``repr``."""
        return f"{len(self._subnets)} networks, {self._active} active"


def _without_waiting(net: SwitchableNet) -> bool:
    """Whether a forward pass belongs to something that has the net to itself: tracing, or another call's backward pass.

    Checkpointed code runs again in the threads of the backward pass, while whoever asked for that waits.
    """
    if torch.compiler.is_compiling():
        return True
    return torch._C._current_graph_task_id() != -1 or getattr(net, "_is_replica", False)
