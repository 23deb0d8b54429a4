"""A model together with its sparse subnetworks."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .counts import SubnetReport, flops_left, nonzero_macs, params_kept
from .coverage import check_coverage, nothing_to_prune
from .deploying import Deployable
from .errors import PatternError
from .graph import Coupling, Weight, obstacles
from .graph.carried import computed
from .hub import HubMixin
from .masks import Mask
from .modes import frozen_norms
from .patterns import DENSE, UMG, Pattern, Subnet, make_all_masks, resolve_patterns
from .patterns.sharded import ShardedValues, sharded_mask
from .selection import Modules, Selection
from .sharding import is_sharded, rows_of, total
from .statistics import Forward, device_of, measure, statistics_of, to_device
from .switchable import SwitchableNet, model_unchanged
from .utils.undo import Snapshot, unchanged

if TYPE_CHECKING:
    from .slimming import Views

log = logging.getLogger(__name__)

Example = tuple[tuple[Any, ...], dict[str, Any]]


class CocktailNet(Deployable, SwitchableNet, HubMixin):
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
        self._same_model()
        self._refuse_changed()
        weights = [*self.eligible, *(w for w in self.coupling.weights if w.unmaskable)]
        names = dict.fromkeys([*(w.name for w in weights), *(p.weight for p in self.coupling.producers)])
        values: Mapping[str, Tensor]
        if self._switcher.tensors.sharded:
            values = self._sharded_values(tuple(names))
        else:
            values = {n: self._multiplied(n) for n in names}
        return UMG(self.coupling, self.eligible, values, previous, dict(made or {}))

    def _multiplied(self, name: str) -> Tensor:
        """The dense value of what the model multiplies with, in the parameter's shape: of a weight norm its result."""
        trace = self.coupling.trace
        graph = trace.computed.get(name) if trace is not None else None
        return self._switcher.dense(name) if graph is None else computed(graph, self._switcher.dense)

    def _sharded_values(self, names: tuple[str, ...]) -> ShardedValues:
        switcher = self._switcher
        device = next(switcher.tensors[n].device for n in names)

        def rows(name: str) -> slice | None:
            given = switcher.tensors.given(name)
            return rows_of(given) if is_sharded(given) else None

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
        name = self._ready(name)
        with self.using(DENSE):
            if name == DENSE:
                self._recalibrate_dense(batches, forward)
                return
            frozen = frozen_norms(self.model)
            before = self.statistics.pop(name, None)  # frozen norms have the dense network's statistics, not older ones
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

    def _unchanged_but_statistics(self) -> AbstractContextManager[Snapshot]:
        tensors = self._switcher.tensors
        # The batches are the user's: what their hooks collect outside of the model on the way may be what they want.
        statistics = [tensors.given(n) for n in self._switcher.norm_buffers]
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
                    params=params_kept(self.coupling, mask),
                    flops=flops_left(self.coupling, mask),
                    nonzero_macs=nonzero_macs(self.coupling, mask),
                    metric=self.metrics.get(name),
                    coverage=pattern.coverage(s, mask, umg) if pattern else 1.0,
                )
            )
        return out

    def slim(self, name: str) -> nn.Module:
        """A plain copy of the subnetwork with removed channels sliced away; checked to compute the same.

        Single masked weights stay as zeros in it. Modules of residual branches that are dropped are taken out, or stay,
        masked, where the model's code wants more of them than to be called.

        Raises:
            SubnetError: There is no such subnetwork.
            SlimError: It cannot be made, or computes something else.
        """
        from .slimming import slim_subnet

        with model_unchanged(self):
            return slim_subnet(self, self._ready(name))

    def views(self, subnets: str | Iterable[str] = "channel") -> Views:
        """Channel subnetworks as slim models that all share one copy of the weights; checked as :meth:`slim` checks.

        Going from one width to another is then a matter of calling another model, which runs at its true cost.

        Args:
            subnets: A pattern's name, for all of its subnetworks, or names of some (``"dense"`` may be among them).
                Each must remove whole channels alone, and of any two one must remove all that the other does.

        Returns:
            By name, the models, of the class of the user's own. See :class:`cocktailsdk.slimming.Views`.

        Raises:
            SubnetError: There are no such subnetworks, or they are not nested.
            SlimError: They cannot be made, or compute something else.
        """
        from .slimming import channel_views

        with model_unchanged(self):
            return channel_views(self, subnets)


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
        example_inputs: Positional arguments of one forward pass (a single tensor is taken as one). Where none are
            given, an adapter is asked for them.
        example_kwargs: Keyword arguments of that pass.
        target_modules: Which modules are eligible: a regular expression over the whole path, or a list of names and
            suffixes. By default all convolution and linear weights but the first convolution and the classifier.
        exclude_modules: Which are not; the same forms. They also keep their output channels.

    Raises:
        PatternError: A pattern is not known or finds nothing to prune, or a selection names nothing. A pattern that can
            touch less than a tenth of the weights, and a level that removes nothing, are logged as warnings.
        AdapterError: No example inputs were given and none can be made.
        ExportFailed: The model cannot be followed on the example inputs.
    """
    if isinstance(model, CocktailNet):
        raise PatternError("the model is a CocktailNet already; give its .model to sparsify it anew")
    if not isinstance(model, nn.Module):
        raise PatternError(f"sparsify takes an nn.Module, not {type(model).__name__}")
    patterns = (patterns,) if isinstance(patterns, str | Pattern) else tuple(patterns)
    chosen = resolve_patterns(patterns)
    selection = Selection.of(model, target_modules, exclude_modules)
    example = example_of(model, example_inputs, example_kwargs)
    coupling = couple_model(model, example, selection)
    eligible = selection.eligible(coupling)
    if not eligible and not coupling.groups:
        kinds = "".join(f"; {k.where}: {k.reason}" for k in obstacles(model)[:2])
        raise PatternError(
            "nothing in the model can be pruned: no weight is eligible and no channels can go "
            f"({nothing_to_prune(coupling, selection)}){kinds}; the first convolution and the classifier become "
            "eligible when target_modules names them"
        )
    net = CocktailNet(model, chosen, coupling, selection, example, {})
    umg = net.umg()
    for name, mask in make_all_masks(chosen, coupling, eligible, umg.values).items():
        net.set_mask(name, mask)
    check_coverage(net, patterns, umg)
    log.info(
        "%d networks of %s: %d eligible weights, %d channel groups",
        len(net.names),
        type(model).__name__,
        len(eligible),
        len(coupling.groups),
    )
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


def couple_model(model: nn.Module, example: Example, selection: Selection, *, prove: bool = True) -> Coupling:
    """The model's coupling, on its own device; see :func:`cocktailsdk.graph.couple`."""
    from .graph import couple

    args, kwargs = to_device(example, device_of(model))
    return couple(model, args, kwargs, exclude=selection.keeps_channels if selection.whole else None, prove=prove)
