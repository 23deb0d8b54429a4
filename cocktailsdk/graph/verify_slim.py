"""The proof at every slimming: slim equals masked in float64, on weights of unit scale."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice, product
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from ..errors import SlimError, described
from ..utils.modes import evaluating
from .compare import (
    NARROWED,
    SINGLE,
    Precision,
    RefuseEmptyHeads,
    doubled,
    failing_module,
    first_difference,
    narrowed,
    randomise,
    relative_error,
    tensors_in,
)
from .copies import duplicate_in_double
from .coupling import Coupling, Node
from .cut import Cutter
from .module_fixes import ModuleFixes, Options, assign
from .relabel import check_labels
from .rewrite import rewritten
from .rewritten_module import with_forward
from .surviving import surviving
from .verify_training import check_training

__all__ = ["Proof", "apply_masks", "verify_slim"]


def apply_masks(model: nn.Module, coupling: Coupling, removed: Bool[Tensor, " units"]) -> None:
    """Zeroes, in place, everything that the removed units touch."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with torch.no_grad():
        for name, keep in coupling.masks(removed).items():
            tensors[name].mul_(keep.to(tensors[name]))


@dataclass(frozen=True)
class Proof:
    """The result of the verification.

    Attributes:
        error: The largest relative error over all outputs.
        fixes: Changes that the slim model needs.
    """

    error: float
    fixes: ModuleFixes


def verify_slim(
    model: nn.Module, cutter: Cutter, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
) -> Proof:
    """Compares slim and masked on a randomised float64 copy of a model.

    Attributes that could have become several sizes (four heads of four channels, say) are settled on the way, each
    module by its own output.

    Args:
        model: The model; not altered.
        cutter: Makes the slim model.
        args: Example positional inputs.
        kwargs: Example keyword inputs.

    Returns:
        The proof.

    Raises:
        SlimError: If the slim model does not run, or computes something else. The first module that differs is named.
    """
    if not args and not kwargs:
        raise SlimError(
            "a slim model is checked by running it, but there are no example inputs; pass example_inputs=(x,)."
        )
    generator = torch.Generator().manual_seed(0)
    masked = duplicate_in_double(model)
    randomise(masked, generator)
    args, kwargs = doubled((tuple(args), dict(kwargs or {})), generator)
    # Cut before masking: the cut takes what survives, and the randomised weights must be equal in both.
    slim, options = cutter.cut(masked)
    scopes = [path for path in cutter.trace.scopes if path]
    with evaluating(masked, clear_caches=True), evaluating(slim, clear_caches=True), torch.no_grad():
        apply_masks(masked, cutter.coupling, cutter.removed)
        precision, outputs = Precision(), _Outputs()
        try:
            with precision, outputs.recorded(masked, [*options, *scopes]):
                want = tensors_in(masked(*args, **kwargs))
        except Exception as error:
            at = failing_module(masked, args, kwargs) or "its own forward"
            raise SlimError(
                f"{type(model).__name__} does not run in float64, in which slim is compared with masked "
                f"({described(error)}; in {at!r}). "
                "Choose an implementation of this module that does."
            ) from error
        if not want and not scopes:
            raise SlimError(
                f"{type(model).__name__} returned no floating-point tensor by which to compare slim with masked; "
                "give example inputs for which it does, or return a dataclass, a tuple or a mapping that holds them."
            )
        survivors = _Survivors(cutter)
        settling = _Settling(masked, slim, options, outputs, cutter, survivors)
        try:
            with precision, settling, RefuseEmptyHeads():
                output = slim(*args, **kwargs)
            if settling.fixes.forwards:  # what is kept has modules with that code, so these are what is looked at
                slim = cutter.cut(masked, settling.fixes)[0].eval()
                with precision:
                    output = slim(*args, **kwargs)
            got = tensors_in(output)
        except Exception as error:
            where = failing_module(slim, args, kwargs)
            before = first_difference(masked, slim, args, kwargs, survivors)
            known = f", after going wrong in {before!r}" if before else ""
            raise SlimError(
                f"the slim {type(model).__name__} does not run ({described(error)}); it fails in "
                f"{where or 'its own forward'!r}{known}. An attribute that this module reshapes or splits by could not "
                "be fixed: exclude it (exclude_modules=[...]) or register an adapter for its class.",
                module=before or where,
            ) from error
        worst = relative_error(got, want, want)
        for path in scopes:  # a detector may find nothing to return; its parts always return something
            part = slim.get_submodule(path)
            inside, kw = outputs.inputs[path]
            with precision:
                got_inside = tensors_in(part(*inside, **kw))
            worst = max(worst, relative_error(got_inside, outputs.seen[path], outputs.seen[path]))
        limit = precision.limit
        # `not <=` instead of `>`: NaN must fail. If masking leaves an output of nothing but rounding errors, its
        # relative error means nothing, so the dense output sets the scale.
        if not worst <= limit and _near_zero(want):
            worst = relative_error(got, want, _dense_outputs(model, args, kwargs))
        if not worst <= limit:
            where = first_difference(masked, slim, args, kwargs, survivors)
            raise SlimError(
                f"the slim {type(model).__name__} computes something else than the masked one: relative error "
                f"{worst:.1e}, allowed {limit:.0e}. The first module that differs is "
                f"{where!r}. Exclude it (exclude_modules=[...]) and report it, "
                "please: this should not happen.",
                module=where,
            )
        # After eval mode, since a model that is wrong there should be reported with the module that is wrong there.
        check_training(masked, slim, args, kwargs)
        if precision.narrowed:  # such kernels cannot be exported in float64 either, and labels have no precision
            slim, (args, kwargs) = slim.float(), narrowed((args, kwargs))
        check_labels(slim, cutter, args, kwargs)
    return Proof(worst, settling.fixes)


def _near_zero(outputs: Sequence[Tensor]) -> bool:
    """Whether an output is so small, next to unit scale, that it holds only rounding errors."""
    return any(t.numel() and float(t.abs().max()) < SINGLE for t in outputs)


def _dense_outputs(model: nn.Module, args: Any, kwargs: Any) -> list[Tensor]:
    """The outputs of the randomised model before masking."""
    dense = duplicate_in_double(model)
    randomise(dense, torch.Generator().manual_seed(0))
    with evaluating(dense, clear_caches=True), torch.no_grad(), Precision():
        return tensors_in(dense(*args, **kwargs))


class _Outputs:
    """Inputs and outputs of some modules of the masked model at their first call."""

    def __init__(self) -> None:
        self.inputs: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        self.seen: dict[str, list[Tensor]] = {}

    @contextmanager
    def recorded(self, model: nn.Module, paths: Sequence[str]) -> Iterator[None]:
        """While it is entered, the model's modules of these paths are recorded."""
        with ExitStack() as hooks:
            for path in paths:

                def hook(_m: nn.Module, args: Any, kwargs: Any, out: Any, path: str = path) -> None:
                    self.inputs.setdefault(path, (args, kwargs))
                    self.seen.setdefault(path, tensors_in(out))

                hooks.enter_context(model.get_submodule(path).register_forward_hook(hook, with_kwargs=True))
            yield


class _Settling:
    """While the slim model runs, finds for each module the attribute values that reproduce the masked output."""

    MOST = 128
    """Combinations tried for a module."""

    def __init__(
        self,
        masked: nn.Module,
        slim: nn.Module,
        options: Options,
        outputs: _Outputs,
        cutter: Cutter,
        survivors: _Survivors,
    ) -> None:
        self.fixes = ModuleFixes()
        self._survivors = survivors
        self._masked, self._slim, self._options, self._outputs, self._cutter = masked, slim, options, outputs, cutter
        self._settled: set[str] = set()
        self._busy: set[str] = set()
        self._code: dict[str, Callable[..., Any]] = {}
        self._own: dict[str, Callable[..., Any] | None] = {}

    def __enter__(self) -> _Settling:
        for path in self._options:
            module = self._slim.get_submodule(path)
            self._code[path] = module.forward
            self._own[path] = vars(module).get("forward")  # some choose theirs when they are built
            # An instance attribute shadows the class's forward, and nn.Module.__call__ still runs hooks around it.
            module.forward = partial(self._forward, path, module)
        return self

    def __exit__(self, *_: object) -> None:
        for path, own in self._own.items():
            module = self._slim.get_submodule(path)
            del module.forward
            if own is not None:
                module.forward = own

    def _forward(self, path: str, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        # Children settle while their parent is tried, so each is looked at with the inputs that it really gets.
        if path not in self._settled and path not in self._busy:
            self._busy.add(path)
            try:
                self._try(path, module, args, kwargs)
            finally:
                self._busy.discard(path)
        return self._code[path](*args, **kwargs)

    def _try(self, path: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        names = list(self._options[path])
        first = {name: values[0] for name, values in self._options[path].items()}
        # The likeliest value of each attribute comes first, so the first combination is usually right.
        for values in islice(product(*self._options[path].values()), self.MOST):
            chosen = dict(zip(names, values, strict=True))
            assign(module, chosen)
            if self._right(path, lambda: self._code[path](*args, **kwargs)):
                self.fixes.attributes[path] = chosen
                self._settled.add(path)
                return
        # No attribute does it: give the module its own code with the right sizes.
        assign(module, first)
        if not path or path not in self._outputs.inputs:  # the model itself stays of the user's own class
            return
        original, inputs = self._masked.get_submodule(path), self._outputs.inputs[path]
        graph = rewritten(original, module, path, inputs, (args, kwargs), self._cutter.trace, self._cutter.keep)
        if graph is None:
            return
        made = with_forward(module, graph)
        if self._right(path, lambda: made(*args, **kwargs)):
            self.fixes.attributes[path] = first
            self.fixes.forwards[path] = graph
            self._settled.add(path)
            self._code[path] = made.forward  # for the rest of this run; the model that is kept gets a module

    def _right(self, path: str, run: Callable[[], Any]) -> bool:
        """Whether a module returns the surviving part of the masked module's output."""
        try:
            got = tensors_in(run())
        except Exception:  # wrong sizes raise all kinds of errors
            return False
        wanted = self._outputs.seen.get(path)
        expected = self._survivors.returned(path, wanted[0]) if wanted else None
        return expected is None or relative_error(got[:1], [expected], [expected]) <= NARROWED


class _Survivors:
    """The surviving part of tensors that modules of the masked model receive or return, where it is known."""

    def __init__(self, cutter: Cutter) -> None:
        self._keep = cutter.keep
        self._returned: dict[str, Node] = {}
        self._inputs: dict[str, dict[tuple[int, ...], Node]] = {}
        by_name = {n.name: n for n in cutter.trace.nodes}
        for node in cutter.trace.nodes:
            sources = [by_name[name] for name in node.inputs]
            for path in node.within:
                # The last call inside a module wins: its result is what the module returns, if shapes agree.
                self._returned[path] = node
                for source in sources:
                    if path and source.shape is not None and path not in source.within:
                        self._inputs.setdefault(path, {}).setdefault(source.shape, source)

    def __call__(self, path: str, value: Tensor, is_input: bool) -> Tensor:
        """What is left of a tensor that a module is given first (or else returns first)."""
        if not is_input:
            left = self.returned(path, value)
            return value if left is None else left
        node = self._inputs.get(path, {}).get(tuple(value.shape))
        return value if node is None else surviving(value, node, self._keep)

    def returned(self, path: str, value: Tensor) -> Tensor | None:
        """What is left of what a module returns, or ``None`` where that is not known."""
        node = self._returned.get(path)
        return None if node is None or node.shape != tuple(value.shape) else surviving(value, node, self._keep)
