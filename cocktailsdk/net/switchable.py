"""A model whose tensors become those of one subnetwork or another, in place."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..errors import CocktailError
from ..graph import Coupling
from ..graph.hook_weights import refresh_hook_weights
from ..masks import Mask
from ..patterns import DENSE, Subnet
from ..utils.batchnorm import statistics_of
from .masked_model import MaskedModel
from .private import check_unsharded, private_copies
from .routing import RouterGuard
from .rwlock import ReadWriteLock
from .switcher import forget_derived
from .tuners import MergeGuard, adapter_caches
from .write_policy import Changes, changed_tensors, check_changes, is_from_training, write_error

__all__ = ["SwitchableModel"]

_RENAMED = "net.{} is net.{} now; the old name goes with the next version"


class SwitchableModel(MaskedModel):
    """A model with masks for its subnetworks, one of which is active.

    Threads may use one net together: a forward pass sees one subnetwork from start to end. :meth:`switch` and
    :meth:`using` wait until running passes are done, and passes that come meanwhile wait for them. That holds for calls
    of the net itself; whoever calls :attr:`model` or its other methods (``net.generate``) does so within
    ``with net.hold():`` or ``with net.using(name):``.
    """

    def __init__(self, model: nn.Module, coupling: Coupling, subnets: Sequence[Subnet]) -> None:
        super().__init__(model, coupling, subnets)
        self._lock = ReadWriteLock()
        self._hooked = tuple(m for m in model.modules() if m._forward_pre_hooks)
        self._merges = MergeGuard(model)
        self._routers = RouterGuard(model, coupling)
        self._adapter_caches = adapter_caches(model)
        self.training = model.training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the active subnetwork."""
        if _needs_no_lock(self):
            return self.model(*args, **kwargs)
        with self._lock.read():
            return self.model(*args, **kwargs)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """As of any module: compiles :attr:`model`, in place. Switching does not compile it again."""
        self.model.compile(*args, **kwargs)

    def switch(self, name: str, *, changes: Changes = "refuse") -> Self:
        """Make a subnetwork the active one, in place.

        The model's own tensors are changed; their dense values are kept beside and restored bit for bit by
        ``switch("dense")``. Waits for forward passes that other threads run; see :meth:`preload` for a switch that
        takes microseconds.

        Args:
            name: The subnetwork.
            changes: What is done where somebody has changed tensors that the active subnetwork masks, or norms'
                buffers, since it became active (``load_state_dict``, an optimizer's step, ``copy_``): ``"refuse"`` the
                switch, ``"keep"`` their values as they are now for the dense network's, zeros included, or
                ``"discard"`` them. Of parameters for which the subnetwork has private tensors, ``"keep"`` makes the
                values its private tensors; the dense network's do not change. What forward passes in train mode make
                of running statistics is no such change: the subnetwork keeps it in :attr:`statistics`.

        Returns:
            The net itself.

        Raises:
            SubnetError: There is no such subnetwork, it has no mask yet, this thread is in a forward pass or holds the
                active one, or tensors were changed while the active one was.
            CocktailError: Modules or parameters of the model were added, removed or replaced.
        """
        name, changes = self._require_mask(name), check_changes(changes)
        with self._lock.write():
            self._handle_writes(name, name, changes)
            self._activate(name, name)
            self._mask_cache.release()
            if self._active == DENSE:
                self._switcher.weights.release()  # the spare memory of statistics is small, and saves time
        return self

    def preload(self, *names: str) -> Self:
        """Compute subnetworks' weights and statistics now, so that a switch to them takes microseconds.

        Each takes as much memory as the tensors that it masks or owns, one copy of the model at most. The next call
        replaces what this one preloaded; ``preload()`` frees all. Forward passes of other threads go on meanwhile. Once
        the dense weights, :attr:`statistics` or :attr:`private` change, the copies are not used any more. A change
        through ``.data`` is not detected: preload again after one.

        This helps models on the CPU, where masking a subnetwork's weights takes about as long as loading them.
        Elsewhere only the masks are copied to the model's device.

        Returns:
            The net itself.

        Raises:
            SubnetError: There is no such subnetwork, or it has no mask yet.
        """
        wanted = dict.fromkeys(self._require_mask(name) for name in names)
        with self._lock.update():  # nothing that a forward pass reads changes
            self._switcher.forget_all_but(wanted)
            for name in wanted:
                if name != DENSE:
                    own = self.statistics.get(name, {})
                    self._switcher.preload(name, self._device_masks(name), own, self._private.get(name, {}))
            self._mask_cache.release()
        return self

    @property
    def preloaded(self) -> list[str]:
        """Names of the subnetworks whose preloaded weights are still right; see :meth:`preload`."""
        private = self._private
        return [name for name in self._subnets if self._switcher.preloaded(name, private.get(name, {})) is not None]

    def prepare(self, *names: str) -> Self:
        """Deprecated name of :meth:`preload`."""
        warnings.warn(_RENAMED.format("prepare", "preload"), DeprecationWarning, stacklevel=2)
        return self.preload(*names)

    @property
    def prepared(self) -> list[str]:
        """Deprecated name of :attr:`preloaded`."""
        warnings.warn(_RENAMED.format("prepared", "preloaded"), DeprecationWarning, stacklevel=2)
        return self.preloaded

    @contextlib.contextmanager
    def hold(self) -> Iterator[str]:
        """For a while, let no other thread switch: for requests that are more than one call of the net.

        Any number of threads may hold the active subnetwork at once; a switch waits for all of them.

        Yields:
            Its name.
        """
        with self._lock.read():
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
                shares them. Private tensors go with the weights in any case.
            changes: As for :meth:`switch`, for what is changed inside; after an exception inside, changes are dropped.

        Raises:
            SubnetError: There is no such subnetwork, it has no mask yet, this thread is in a forward pass or holds the
                active one, or tensors were changed inside or before.
            CocktailError: Modules or parameters of the model were added, removed or replaced.
        """
        target, changes = self._require_mask(name), check_changes(changes)
        with self._lock.write():
            before, statistics_before = self._active, self._statistics_active if statistics else None
            self._handle_writes(target, target if statistics else None, "refuse")
            try:
                self._activate(target, target if statistics else None, watch=changes != "discard")
                yield self
            except BaseException:
                with contextlib.suppress(CocktailError):  # the model was changed: the dense network is active then
                    self._handle_writes(before, statistics_before, "discard", inside=True)
                    self._activate(before, statistics_before)
                raise
            self._leave(before, statistics_before, changes)

    def _leave(self, name: str, statistics: str | None, changes: Changes) -> None:
        try:
            self._handle_writes(name, statistics, changes, inside=True)
        finally:
            with contextlib.suppress(CocktailError):
                self._check_structure()
                self._activate(name, statistics)

    def _check_structure(self) -> None:
        """Check that the model still has the modules and parameters that it had.

        Raises:
            CocktailError: Modules or parameters were added, removed or replaced; says which. The dense network is
                active then, in the tensors that were changed.
        """
        try:
            super()._check_structure()
        except CocktailError:
            if self._active != DENSE or self._statistics_active != DENSE:
                with self._lock.write():
                    active = self._masks.get(self._active, Mask())
                    self._switcher.abandon(active.tensors(self.coupling), self._private.get(self._active, {}))
                    self._merges.lift()
                    self._routers.lift()
                    self._active = self._statistics_active = DENSE
            raise

    def _handle_writes(self, name: str, statistics: str | None, changes: Changes, *, inside: bool = False) -> None:
        """Find what somebody wrote into the active subnetwork's tensors, before another becomes active.

        Args:
            name: The network that is to be active.
            statistics: The network whose statistics are to be active; ``None`` where these do not change.
            changes: As for :meth:`switch`.
            inside: Whether it was written inside :meth:`using`, which ends.

        Raises:
            SubnetError: Tensors were written, and ``changes`` is ``"refuse"``.
        """
        if inside:
            self._check_structure()
        switcher, active = self._switcher, self._active
        switcher.weights.recheck()
        switcher.norms.recheck()
        if changes == "discard":
            if name != active and switcher.weights.swapped and not switcher.weights.untouched():
                switcher.forget([active])
            return
        weights: list[str] = []
        private = self._private.get(active, {})
        if name != active and not switcher.weights.untouched():
            switcher.forget([active])  # the write went into the preloaded memory
            weights = changed_tensors(switcher, switcher.weights, self._device_masks(active), private)
        buffers: list[str] = []
        trained = False
        own = self._statistics_active
        if statistics not in (None, own) and not switcher.norms.untouched():
            changed = changed_tensors(switcher, switcher.norms, self._norm_masks(own), self.statistics.get(own))
            buffers = [n for n in changed if not is_from_training(switcher, n.rpartition(".")[0])]
            trained = len(buffers) < len(changed)
        if (weights or buffers) and changes == "refuse":
            raise write_error([*weights, *buffers], active if weights else own, name, inside=inside)
        if weights or buffers:
            self._adopt_as_private(active, [n for n in weights if n in private])
            switcher.adopt_as_dense([n for n in weights if n not in private], buffers)
        if trained:
            self.statistics[own] = {n: t for n, t in statistics_of(self.model).items() if n not in buffers}

    def _adopt_as_private(self, name: str, parameters: Sequence[str]) -> None:
        """Make the current values of parameters private tensors of the active subnetwork, which has some for them."""
        if parameters:
            now = {**self._private[name], **{n: self._switcher.tensors[n].detach() for n in parameters}}
            self._private[name] = private_copies(now, self._masks[name], self._switcher.tensors, self.coupling)

    def _refuse_writes(self) -> None:
        """Before dense values are read: check that nobody wrote the tensors of the active subnetwork.

        Raises:
            SubnetError: Somebody did.
        """
        if self._active != DENSE:
            self._handle_writes(DENSE, None, "refuse")

    def _activate(self, name: str, statistics: str | None, *, watch: bool = True) -> None:
        """Make a network active, and the statistics of one; ``None`` leaves these as they are."""
        switcher = self._switcher
        if name != self._active:
            # Masks are looked up before the dense weights come back: if that fails, nothing has changed.
            own = self._private.get(name, {})
            check_unsharded(name, own, switcher.tensors)
            masks = {} if name == DENSE or switcher.has_preloaded(name) else self._device_masks(name)
            switcher.restore(switcher.weights)
            self._merges.lift()
            self._routers.lift()
            self._active = DENSE  # in case the next lines fail
            if name != DENSE and not switcher.swap_in_weights(name, own):
                switcher.mask(masks or self._device_masks(name), own)
            if name != DENSE:
                self._routers.arm(self._masks[name])
            self._active = name
            for cache in self._adapter_caches:
                cache.clear()
            # Weights that a forward pre-hook computes (weight norm): whoever reads one before the next forward pass
            # must see this subnetwork's.
            refresh_hook_weights(self._hooked)
            if name != DENSE:
                self._merges.arm(name)
            if watch:
                switcher.weights.watch(switcher.tensors)
        if statistics not in (None, self._statistics_active):
            self._activate_statistics(statistics)
            if watch:
                switcher.norms.watch(switcher.tensors)

    def _activate_statistics(self, name: str) -> None:
        self._switcher.restore(self._switcher.norms)
        self._statistics_active = DENSE  # in case the next lines fail
        if name != DENSE:
            own = self.statistics.get(name, {})
            if not self._switcher.swap_in_statistics(name, own):
                self._switcher.load_statistics(own, self._norm_masks(name))
        self._statistics_active = name

    def dense_tensor(self, name: str) -> Tensor:
        """A parameter's or buffer's dense value, whatever is active: the model's own memory, or the saved copy.

        A sharded parameter (FSDP2) is gathered: all processes must ask for it.
        """
        self._check_structure()
        self._refuse_writes()
        return self._switcher.dense(name)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As of any module, with the dense values, whatever is active."""
        prefix = kwargs.get("prefix", args[1] if len(args) > 1 else "")
        self._check_structure()
        self._refuse_writes()
        with self._lock.read():
            state = super().state_dict(*args, **kwargs)
            for backup in (self._switcher.weights, self._switcher.norms):
                for name, value in backup.values.items():
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
            # From the tables: self.model would call this method again, without end, while they are not there yet (in
            # __init__, or when copied and unpickled).
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


def _needs_no_lock(net: SwitchableModel) -> bool:
    """Whether a forward pass belongs to somebody who has the net to themselves: tracing, or a call's backward pass.

    Checkpointed code runs again in the threads of the backward pass, while the thread that called it waits. That
    thread may be inside :meth:`SwitchableModel.using`, and the lock would wait for it forever.
    """
    if torch.compiler.is_compiling():
        return True
    # -1 outside of a backward pass. There is no public name for it; torch.utils.checkpoint (2.14) asks the same way.
    # `_is_replica` is set on the copies that nn.DataParallel makes, which no switch changes.
    return torch._C._current_graph_task_id() != -1 or getattr(net, "_is_replica", False)
