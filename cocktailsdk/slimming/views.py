"""Channel subnetworks as slim models that share one set of tensors."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from ..errors import SlimError, SubnetError
from ..graph.compare import failing_module, leaves_of
from ..graph.copies import duplicate
from ..graph.cut import Cutter
from ..graph.reorder import nested_order
from ..graph.verify_slim import verify_slim
from ..models import after_slim
from ..net.subnet_model import SubnetModel
from ..patterns import DENSE
from ..utils.batchnorm import norm_buffers
from ..utils.devices import device_of
from ..utils.modes import evaluating
from ..utils.nested import to_device
from ..utils.undo import unchanged
from .subnets import traced_coupling

__all__ = ["Views", "channel_views"]

log = logging.getLogger(__name__)

CLOSE = 1e-2
"""How far, relative to its size, what a view returns on the example inputs may lie from what the net does.

That it computes the same is proven in float64; this finds code that reads its weights' memory otherwise than by their
strides.
"""


class Views(Mapping[str, nn.Module]):
    """Channel subnetworks by name, each a slim model whose parameters are parts of one set of tensors.

    Of nested subnetworks each keeps some of the channels that the one before keeps, so the channels can be put in an
    order in which every subnetwork has the first of each group. The weights are copied once in this order; each model's
    parameters are the first rows and columns of these, and take no memory of their own. Where what is left is no such
    part of a tensor (the columns that read a concatenated input, the rows of one weight that makes q, k and v), it is
    copied: :attr:`copied` says what. Each model has its own batch-norm statistics and private tensors.

    Any number of them can be used at the same time, in any threads: nothing is changed to go from one to another.

    They are for inference: parameters require no gradient, and a change of one would change the others. They do not
    follow later changes of the net's weights. To train or to save one, use :meth:`CocktailNet.slim`.

    Attributes:
        shared: All parameters and buffers of the dense network by name, channels in the common order.
        copied: By subnetwork, the bytes of every parameter and buffer that it holds apart, batch-norm statistics and
            private tensors too.
    """

    def __init__(self, models: Mapping[str, nn.Module], shared: Mapping[str, Tensor]) -> None:
        self._models = dict(models)
        self.shared = dict(shared)
        storages = {t.untyped_storage().data_ptr() for t in shared.values()}
        self.copied: dict[str, dict[str, int]] = {
            name: {
                n: t.untyped_storage().nbytes()
                for n, t in _tensors(model).items()
                if t.untyped_storage().data_ptr() not in storages
            }
            for name, model in self._models.items()
        }

    def __getitem__(self, name: str) -> nn.Module:
        return self._models[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._models)

    def __len__(self) -> int:
        return len(self._models)

    @property
    def shared_bytes(self) -> int:
        """Bytes of :attr:`shared`."""
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in self.shared.values()}
        return sum(storages.values())

    @property
    def copied_bytes(self) -> int:
        """Bytes of everything in :attr:`copied`."""
        return sum(sum(tensors.values()) for tensors in self.copied.values())

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile each model in place, as :meth:`torch.nn.Module.compile` does; each is compiled when it first runs."""
        for model in self._models.values():
            model.compile(*args, **kwargs)

    def __repr__(self) -> str:
        return f"Views({', '.join(self)}; {self.shared_bytes} bytes shared, {self.copied_bytes} copied)"


def channel_views(net: SubnetModel, subnets: str | Iterable[str]) -> Views:
    """Views of a net's channel subnetworks; see :meth:`CocktailNet.views`."""
    if net.example is None:
        raise SlimError(
            "views are checked by running them, but the bundle could not describe the model's example inputs: set "
            "net.example = (args, kwargs)"
        )
    removed = _nested(net, subnets)
    args, kwargs = to_device(net.example, device_of(net.model))
    coupling = traced_coupling(net)
    trace = coupling.trace
    assert trace is not None
    ordered = _dense_copy(net)
    order = nested_order(ordered, coupling, list(removed.values()), args, kwargs)
    order.apply(ordered)
    buffers = set(norm_buffers(ordered))
    shared = _tensors(ordered)
    changed = buffers.union(*(net.private.get(name, ()) for name in removed))
    dense = {n: t.detach().clone() for n, t in shared.items() if n in changed}
    models: dict[str, nn.Module] = {}
    for name, gone in removed.items():
        cutter = Cutter(coupling, trace, order.removed(gone))
        fixes = verify_slim(ordered, cutter, args, kwargs).fixes
        private = net.private.get(name, {})
        own = {**net.statistics.get(name, {}), **private}
        _put_own(shared, dense, {n: order.of(n, v) for n, v in own.items()})
        made = cutter.cut(ordered, fixes, share=shared.keys() - buffers - private.keys())[0]
        _settle(made, cutter.cut(ordered, fixes)[0], name, args, kwargs)
        models[name] = after_slim(made.requires_grad_(False), (args, kwargs))
        log.info("%s is a view", name)
    _put_own(shared, dense, {})
    return Views(models, {n: t.detach() for n, t in shared.items()})


def _nested(net: SubnetModel, subnets: str | Iterable[str]) -> dict[str, Bool[Tensor, " units"]]:
    """What each subnetwork removes, from the widest to the narrowest.

    Raises:
        SubnetError: There are no such subnetworks, or they cannot share tensors.
    """
    if isinstance(subnets, str):
        patterns = [p.name for p in net.patterns]
        chosen = [s.name for p in net.patterns if p.name == subnets for s in p.subnets()]
        if not chosen:
            raise SubnetError(
                f"no pattern {subnets!r}; this net has {', '.join(patterns)} (a list of subnets' names is taken too)"
            )
    else:
        chosen = [net.subnet(name).name for name in subnets]
    out: dict[str, Tensor] = {}
    for name in dict.fromkeys(chosen):
        mask = net.masks.get(name)
        if mask is None and name != DENSE:
            raise SubnetError(f"subnet {name!r} has no mask yet: it is made in a later round of training (set_mask)")
        if mask is not None and mask.experts:
            raise SubnetError(f"{name!r} removes experts, which no order of channels puts last: use switch, or slim")
        if mask is not None and (mask.elements or mask.removed is None):
            raise SubnetError(f"{name!r} masks single weights, so it shares no tensors with other widths: use switch")
        out[name] = torch.zeros(net.coupling.n_units, dtype=torch.bool)
        if mask is not None and mask.removed is not None:
            out[name] |= mask.removed
    ordered = dict(sorted(out.items(), key=lambda item: int(item[1].sum())))
    for wide, narrow in itertools.pairwise(ordered):
        if bool((ordered[wide] & ~ordered[narrow]).any()):
            raise SubnetError(
                f"{wide!r} removes channels that the narrower {narrow!r} keeps, so no order of channels serves both: "
                "ask for views of one pattern's subnetworks"
            )
    if not ordered:
        raise SubnetError("no subnets were named")
    return ordered


def _dense_copy(net: SubnetModel) -> nn.Module:
    """A copy of the model with the dense values, whatever is active."""
    with net.hold(), torch.no_grad():
        made = duplicate(net.model)
        for n, t in _tensors(made).items():
            t.copy_(net.dense_tensor(n))
    return made


def _put_own(tensors: Mapping[str, Tensor], dense: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Put a subnetwork's own statistics and private tensors in the place of the dense network's values."""
    with torch.no_grad():
        for n, value in dense.items():
            tensors[n].copy_(own.get(n, value))


def _settle(view: nn.Module, slim: nn.Module, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Gives modules copies of parts that their code cannot read in place.

    Raises:
        SlimError: A view returns something else than the slim model with the same values.
    """
    with evaluating(view, clear_caches=True), evaluating(slim, clear_caches=True), torch.no_grad():
        want, got = leaves_of(slim(*args, **kwargs)), _run(view, name, args, kwargs)
    for g, w in zip(got, want, strict=True):
        if g.shape != w.shape or not float((g - w).norm()) <= CLOSE * max(float(w.norm()), CLOSE):
            raise SlimError(f"the view of {name!r} returns something else than the net does; use net.slim({name!r})")


def _run(view: nn.Module, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    while True:
        try:
            with unchanged(view):
                return leaves_of(view(*args, **kwargs))
        except RuntimeError:
            at = failing_module(view, args, kwargs)
            apart = [p for p in view.get_submodule(at).parameters() if not p.is_contiguous()]
            if not apart:
                raise
            log.info("%s: the code of %r wants its weights in one piece", name, at)
            for p in apart:  # by .data: the parameter stays the same object, and no longer shares memory
                p.data = p.detach().contiguous()


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}
