"""A model together with its sparse subnetworks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import PatternError
from ..graph import Coupling, Weight
from ..graph.weight_graph import run_weight_graph
from ..masks import Mask
from ..patterns import DENSE, UMG, Pattern, Subnet
from ..patterns.sharded import ShardedValues, sharded_mask
from ..utils.batchnorm import Forward, frozen_norms, measure, statistics_of
from ..utils.fsdp import is_sharded, rows_of, total
from ..utils.undo import Snapshot, unchanged
from .costs import SubnetReport, nonzero_macs, private_bytes, remaining_params, slim_flops
from .switchable import SwitchableModel
from .target_modules import Selection
from .tracing import Example

__all__ = ["SubnetModel", "model_unchanged"]


@contextlib.contextmanager
def model_unchanged(net: SubnetModel, *, watch: bool = True) -> Iterator[None]:
    """:func:`~cocktailsdk.utils.undo.unchanged` for a net's model, while its subnetworks may be switched.

    Tensors that switching gives other values or memory are left out: the net restores these itself.

    Raises:
        CocktailError: The model has other modules or parameters than it had.
    """
    net._check_structure()
    tensors = net._switcher.tensors
    names = {*net.coupling.fields, *net.coupling.shapes, *net._switcher.norm_buffers}
    with unchanged(net.model, but=[tensors.registered(name) for name in names if name in tensors], watch=watch):
        yield


class SubnetModel(SwitchableModel):
    """A dense network and its sparse subnetworks, which share its weights.

    Made by :func:`sparsify` and :func:`from_pretrained`. It behaves as the model does: calls and unknown attributes go
    to :attr:`model`, the user's own instance, whose tensors are changed in place by :meth:`switch`.

    While a subnetwork is active, ``net.model`` *is* that subnetwork: ``net.model.state_dict()`` holds its masked
    weights. ``net.state_dict()``, ``net.save_pretrained()`` and ``net.umg()`` always see the dense weights. Copies made
    by ``copy.deepcopy(net)`` have the same subnetwork active.

    Attributes:
        model: The user's own model.
        patterns: Its patterns, in the order given.
        coupling: What goes together when channels go.
        eligible: The weights that elementwise patterns may touch.
        selection: What the user targeted and excluded.
        example: ``(args, kwargs)`` on which the model was traced; ``None`` where a bundle could not describe them.
        metrics: A metric by subnet name, set by training or by the user, saved in bundles.
        statistics: Batch-norm means and variances by subnet name, each by the buffers' full names. Where a subnet has
            none, the dense network's are used. Those of ``"dense"`` are the model's own buffers; its entry here, if
            there is one, is a copy for reading.
        private: Parameters' values that a subnetwork owns, by subnet name and parameter name; read-only. Set them with
            :meth:`set_private`.
        provenance: Where the networks come from, as JSON values, saved in bundles: ``"versions"`` of what made them,
            and what training or the user adds (``"training"``, ``"data"``, ``"seed"``, ``"command"``).
    """

    def __init__(
        self,
        model: nn.Module,
        patterns: tuple[Pattern, ...],
        coupling: Coupling,
        selection: Selection,
        example: Example | None,
        masks: Mapping[str, Mask],
    ) -> None:
        super().__init__(model, coupling, [s for p in patterns for s in p.subnets()])
        self.patterns = patterns
        self.selection = selection
        self.eligible: tuple[Weight, ...] = selection.eligible(coupling)
        self.example = example
        self.provenance: dict[str, Any] = {}
        for name, mask in masks.items():
            self.set_mask(name, mask)

    def pattern(self, name: str) -> Pattern:
        """The pattern of a registered name.

        Raises:
            PatternError: The net has none of that name.
        """
        for p in self.patterns:
            if p.name == name:
                return p
        raise PatternError(f"this net has no pattern {name!r}; it has {', '.join(p.name for p in self.patterns)}")

    def make_masks(
        self, subnet: Subnet | str, previous: Mask | None = None, made: Mapping[str, Mask] | None = None
    ) -> Mask:
        """The mask that the subnet's pattern makes from the dense weights as they are now (UMG). It is not set.

        Args:
            subnet: The subnet or its name.
            previous: The pattern's mask of the level before; used by nested patterns.
            made: Masks of this round by other patterns, by pattern name.
        """
        s = self.subnet(subnet) if isinstance(subnet, str) else subnet
        pattern = self.pattern(s.pattern)
        umg = self.umg(previous if pattern.nested else None, made)
        return sharded_mask(pattern, s, umg) if isinstance(umg.values, ShardedValues) else pattern.mask(s, umg)

    def umg(self, previous: Mask | None = None, made: Mapping[str, Mask] | None = None) -> UMG:
        """What a pattern sees of this net: the dense weights, whatever is active."""
        self._check_structure()
        self._refuse_writes()
        producers = (p.weight for p in self.coupling.producers)
        names = dict.fromkeys([*(w.name for w in self.coupling.weights), *producers])
        values: Mapping[str, Tensor]
        if self._switcher.tensors.sharded:
            values = self._sharded_values(tuple(names))
        else:
            values = {n: self._effective_weight(n) for n in names}
        return UMG(self.coupling, self.eligible, values, previous, dict(made or {}))

    def _effective_weight(self, name: str) -> Tensor:
        """The dense value that the model multiplies with, in the parameter's shape: a weight norm's result."""
        trace = self.coupling.trace
        graph = trace.computed.get(name) if trace is not None else None
        return self._switcher.dense(name) if graph is None else run_weight_graph(graph, self._switcher.dense)

    def _sharded_values(self, names: tuple[str, ...]) -> ShardedValues:
        switcher = self._switcher
        device = next(switcher.tensors[n].device for n in names)

        def rows(name: str) -> slice | None:
            tensor = switcher.tensors.registered(name)
            return rows_of(tensor) if is_sharded(tensor) else None

        return ShardedValues(
            names,
            local=switcher.dense_part,
            rows=rows,
            whole=switcher.dense,
            total=lambda counts: total(counts, device),
            rank=torch.distributed.get_rank(),
            ranks=torch.distributed.get_world_size(),
        )

    def recalibrate(self, name: str, batches: Iterable[Any], forward: Forward | None = None) -> None:
        """Measure a subnetwork's own batch-norm statistics and keep them in :attr:`statistics`.

        They are the exact average over the batches of each batch's mean and unbiased variance. Only batch norms (and
        instance norms that have running statistics) train meanwhile; dropout and the like are off. The dense network's
        replace the model's buffers.

        A norm that you froze keeps its statistics, the same for every subnetwork. Frozen is a norm that the model's own
        ``train()`` leaves in eval mode; one that is in eval mode now while other modules are in train mode; and one
        with ``momentum=0``. A model that is wholly in eval mode says nothing of this kind: all its norms are measured.

        Args:
            name: The subnetwork, or ``"dense"``.
            batches: Any iterable of batches, each weighing the same.
            forward: ``forward(model, batch)``; by default batches are read as in training
                (:func:`~cocktailsdk.utils.nested.default_forward`); of longer tuples the first element is the input.

        Raises:
            SubnetError: There is no such subnetwork.
            CocktailError: There are no batches.
        """
        name = self._require_mask(name)
        with self.using(DENSE):
            if name == DENSE:
                self._recalibrate_dense(batches, forward)
                return
            frozen = frozen_norms(self.model)
            # Popped before `using` loads them: frozen norms must run with the dense network's statistics.
            before = self.statistics.pop(name, None)
            try:
                with self.using(name, changes="discard"), self._unchanged_but_statistics():
                    measure(self.model, batches, forward, frozen)
                    own = statistics_of(self.model)
            except BaseException:
                if before is not None:
                    self.statistics[name] = before
                raise
            # What a removed channel measured means nothing; as zeros it need not be stored.
            self.zero_masked(name, own)
            self.statistics[name] = own

    def _unchanged_but_statistics(self) -> contextlib.AbstractContextManager[Snapshot]:
        tensors = self._switcher.tensors
        # The batches are the user's: what their hooks collect outside of the model on the way may be what they want.
        statistics = [tensors.registered(n) for n in self._switcher.norm_buffers]
        return unchanged(self.model, but=statistics, watch=False, beyond=False)

    def _recalibrate_dense(self, batches: Iterable[Any], forward: Forward | None) -> None:
        tensors = self._switcher.tensors
        before = {n: tensors[n].clone() for n in self._switcher.norm_buffers}
        try:
            with self._unchanged_but_statistics():
                measure(self.model, batches, forward)
        except BaseException:
            with torch.no_grad():
                for n, value in before.items():
                    tensors[n].copy_(value)
            raise
        self.statistics[DENSE] = statistics_of(self.model)

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
                    params=remaining_params(self.coupling, mask),
                    flops=slim_flops(self.coupling, mask),
                    nonzero_macs=nonzero_macs(self.coupling, mask),
                    metric=self.metrics.get(name),
                    coverage=pattern.coverage(s, mask, umg) if pattern else 1.0,
                    private_bytes=private_bytes(self.coupling, mask, self._private.get(name, {})),
                )
            )
        return out


def constructible(kind: type[SubnetModel]) -> type[Any]:
    """A class of nets, or the nearest of its bases that is constructed as :class:`SubnetModel` is.

    A user's subclass may have a constructor of its own, whose arguments nobody here knows.
    """
    own = next(i for i, base in enumerate(kind.__mro__) if "__init__" in vars(base))
    return kind if kind.__mro__[own] is SubnetModel else constructible(kind.__mro__[own + 1])
