"""The public face: ``sparsify``, ``from_pretrained`` and the object they give, assembled from everything below."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from os import PathLike
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from .bundle import load_bundle
from .bundle.hub_mixin import HubMixin
from .errors import PatternError
from .graph import unsupported_modules
from .net.coverage import check_coverage, nothing_to_prune
from .net.subnet_model import SubnetModel, model_unchanged
from .net.target_modules import Modules, Selection
from .net.tracing import couple_model, example_of
from .patterns import Pattern, make_all_masks, resolve_patterns

if TYPE_CHECKING:
    from .choosing import DeviceProfile
    from .exporting import ExportReport
    from .slimming import Views

__all__ = ["CocktailNet", "from_pretrained", "sparsify"]

log = logging.getLogger(__name__)


class CocktailNet(SubnetModel, HubMixin):
    """A dense network and its sparse subnetworks, which share its weights.

    Made by :func:`sparsify` and :func:`from_pretrained`. All of :class:`~cocktailsdk.net.subnet_model.SubnetModel`, and
    what needs more than the model: smaller models, files, other runtimes, budgets and the hub.
    """

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
            return slim_subnet(self, self._require_mask(name))

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

    def export(
        self,
        name: str,
        path: str | PathLike[str],
        *,
        int8: bool = False,
        calibration: Iterable[Any] | None = None,
        evaluation: Iterable[Any] | None = None,
        metric: Callable[[Any, Any], Tensor] | None = None,
        dynamic_batch: bool = True,
    ) -> ExportReport:
        """Write one subnetwork for another runtime: slim where channels are removed, exact zeros for the rest.

        ============== ==================================================== ==========================================
        suffix         what is written                                      needs
        ============== ==================================================== ==========================================
        .onnx          ONNX                                                 ``pip install "cocktailsdk[onnx]"``
        .xml           OpenVINO IR, the weights in a ``.bin`` beside        ``pip install "cocktailsdk[openvino]"``
        .pt2           ``torch.export``'s graph file
        .safetensors   the plain slim model's tensors
        ============== ==================================================== ==========================================

        What was written is loaded in its runtime and compared with torch on several inputs and batch sizes before it is
        put in its place; if anything fails, no file is left, and one that was there before stays.

        Args:
            name: The subnetwork.
            path: The file; its suffix chooses the format.
            int8: Quantize weights and activations with the runtime's own quantizer (``onnxruntime.quantization``,
                ``nncf``). The report says how far the result is from the network before.
            calibration: Batches of the usual forms from which the ranges of activations are taken. Models of mostly
                linear layers can do without in onnxruntime.
            evaluation: Batches with targets, on which the metric is measured before and after quantizing.
            metric: ``metric(output, target)``, a tensor of scores; accuracy by default.
            dynamic_batch: Whether the batch may have any size; otherwise that of the example inputs.

        Raises:
            ExportFailed: The suffix is not known, a package is missing, the model cannot be followed or written, or the
                runtime computes something else than torch.
            SubnetError: There is no such subnetwork.
            SlimError: It cannot be slimmed.
        """
        from .exporting import export_subnet

        with model_unchanged(self):
            return export_subnet(
                self,
                name,
                path,
                int8=int8,
                calibration=calibration,
                evaluation=evaluation,
                metric=metric,
                dynamic_batch=dynamic_batch,
            )

    def pick(
        self,
        *,
        max_latency_ms: float | None = None,
        max_flops: float | None = None,
        max_bytes: float | None = None,
        pattern: str | None = None,
        profile: DeviceProfile | str | PathLike[str] | None = None,
        batch_size: int | None = None,
        metric_mode: str = "max",
    ) -> str:
        """The best subnetwork within a budget, by name.

        The best has the best metric in :attr:`metrics`; those without one come after all that have one. Without
        metrics, and between equal ones, it is the one that keeps most: most non-zero multiply-adds, then parameters,
        then the fewest FLOPs.

        Args:
            max_latency_ms: Median milliseconds of one forward pass, as ``profile`` says.
            max_flops: FLOPs (2 x multiply-adds) of one forward pass on the example inputs, as dense kernels run them.
            max_bytes: Bytes of the tensors of the plain slim model, zeros included.
            pattern: Only networks of this pattern.
            profile: What ``cocktail-cli bench`` measured on the device: a file, or what was read from one.
            batch_size: The batch that ``max_latency_ms`` is for; by default the smallest in the profile.
            metric_mode: ``"max"`` or ``"min"``: whether a larger or a smaller metric is better.

        Raises:
            SubnetError: No network is within the budget; says which comes nearest and what it takes.
            CocktailError: There is no profile where one is needed, or it was measured on other networks.
        """
        from .choosing import pick

        return pick(
            self,
            max_latency_ms=max_latency_ms,
            max_flops=max_flops,
            max_bytes=max_bytes,
            pattern=pattern,
            profile=profile,
            batch_size=batch_size,
            metric_mode=metric_mode,
        )


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
        kinds = "".join(f"; {k.where}: {k.reason}" for k in unsupported_modules(model)[:2])
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


def from_pretrained(
    path: str | PathLike[str],
    model: nn.Module | None = None,
    *,
    subnets: Iterable[str] | None = None,
    trust_build_record: bool = False,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | PathLike[str] | None = None,
    force_download: bool = False,
    local_files_only: bool = False,
) -> CocktailNet:
    """Load a bundle into a freshly built model.

    No code is run from the files. Everything is checked before the model is touched: if this raises, the model is as
    it was.

    Args:
        path: The bundle's folder, or its name on the Hugging Face hub (``"user/name"``, where no such folder exists).
        model: Of the class and configuration that the bundle was made from; its weights are replaced in place, on the
            device where they lie. It may be left out where the bundle records how to build it, for the
            :mod:`listed <cocktailsdk.records>` classes of timm, torchvision and transformers, in tested versions.
        subnets: Names of the subnetworks to read; by default all. The others' masks and statistics are not read from
            the disk, and cannot be switched to.
        trust_build_record: Without a model, build any class of timm, torchvision and transformers that the bundle
            records, in any version. Set this for bundles of your own. Hub access, remote code and pickle stay off.
        revision: Of the hub's repository a branch, tag or commit.
        token: The hub's access token; by default the one that its client has stored.
        cache_dir: Where the hub's client keeps what it fetched.
        force_download: Whether it fetches again what it has.
        local_files_only: Whether it fetches nothing.

    Returns:
        A net with the dense network active.

    Raises:
        BundleError: The bundle is damaged, of an unknown version, of an unregistered pattern, or of another model; or
            it is not here, and the hub cannot be reached or has none of that name.
        SubnetError: It has no subnetwork of a name in ``subnets``.
    """
    return load_bundle(
        path,
        model,
        net_type=CocktailNet,
        subnets=subnets,
        trust_build_record=trust_build_record,
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        force_download=force_download,
        local_files_only=local_files_only,
    )
