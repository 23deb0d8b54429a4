"""The public object: ``sparsify``, ``from_pretrained``, and the ``CocktailNet`` that they return."""

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
from .patterns import DENSE, Pattern, make_all_masks, resolve_patterns
from .patterns.scoring import PatternScores, ScoreLike
from .utils.losses import ForwardFn, LossFn

if TYPE_CHECKING:
    from .choosing import DeviceProfile
    from .exporting import ExportReport
    from .slimming import Views

__all__ = ["CocktailNet", "from_pretrained", "sparsify"]

log = logging.getLogger(__name__)


class CocktailNet(SubnetModel, HubMixin):
    """A dense network and its sparse subnetworks, which share its weights.

    Made by :func:`sparsify` and :func:`from_pretrained`. It is a
    :class:`~cocktailsdk.net.subnet_model.SubnetModel` that also makes smaller models, writes bundles and other
    runtimes' files, picks a subnetwork by budget, and pushes to the hub.
    """

    def calibrate(
        self,
        score: ScoreLike | Mapping[str, ScoreLike],
        calibration: Iterable[Any] | None = None,
        loss_fn: LossFn | None = None,
        forward_fn: ForwardFn | None = None,
        sequential: bool = False,
    ) -> PatternScores:
        """Judge the dense network's weights, channels and layers by a score; for the arguments see :func:`sparsify`.

        Returns:
            What :meth:`make_masks` ranks by.

        Raises:
            PatternError: See :func:`sparsify`.
        """
        from .calibration import CalibrationData, calibrate

        data = None if calibration is None else CalibrationData.of(calibration)
        with self.using(DENSE), model_unchanged(self):
            return calibrate(
                self.model,
                self.coupling,
                self.eligible,
                self.patterns,
                score,
                data,
                loss_fn,
                forward_fn,
                sequential=sequential,
            )

    def slim(self, name: str) -> nn.Module:
        """A plain copy of the subnetwork without its removed channels; verified against the masked model.

        Single masked weights stay in the copy as zeros. The modules of dropped residual branches are removed. If the
        model's code does more with such modules than call them, they stay and are masked.

        Raises:
            SubnetError: There is no such subnetwork.
            SlimError: The copy cannot be made, or its output differs from the masked model's.
        """
        from .slimming import slim_subnet

        with model_unchanged(self):
            return slim_subnet(self, self._require_mask(name))

    def views(self, subnets: str | Iterable[str] = "channel") -> Views:
        """Channel subnetworks as slim models that all share one copy of the weights; verified as by :meth:`slim`.

        To change the width, call another of these models. Each runs at its true cost.

        Args:
            subnets: The name of a pattern, for all of its subnetworks, or names of subnetworks (``"dense"`` may be
                among them). They must remove whole channels only, and must be nested.

        Returns:
            The models by name, of the class of your own model. See :class:`cocktailsdk.slimming.Views`.

        Raises:
            SubnetError: There are no such subnetworks, or they are not nested.
            SlimError: The models cannot be made, or their output differs from the masked model's.
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

        The new file is loaded in its runtime and compared with torch on several inputs and batch sizes. Only then does
        it replace a file that was there before. If anything fails, no new file is left, and the old one stays.

        Args:
            name: The subnetwork.
            path: The file; its suffix chooses the format.
            int8: Quantize weights and activations with the runtime's own quantizer (``onnxruntime.quantization``,
                ``nncf``). The report says how much the outputs change.
            calibration: Batches from which the ranges of activations are taken. In onnxruntime, models of mostly linear
                layers need none.
            evaluation: Batches with targets, on which the metric is measured before and after quantizing.
            metric: ``metric(output, target)`` gives a tensor of scores. Default: accuracy.
            dynamic_batch: Whether the batch may have any size. Otherwise it has the size of the example inputs.

        Raises:
            ExportFailed: The suffix is unknown, a package is missing, the model cannot be traced or written, or the
                outputs of the runtime differ from torch's.
            SubnetError: There is no such subnetwork.
            SlimError: The subnetwork cannot be slimmed.
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

        Subnetworks are ranked by their metric in :attr:`metrics`; those without a metric come last. Equal ones are
        ranked by non-zero multiply-adds (most first), then by parameters (most first), then by FLOPs (fewest first).

        Args:
            max_latency_ms: Median milliseconds of one forward pass, as measured in ``profile``.
            max_flops: FLOPs (2 x multiply-adds) of one forward pass on the example inputs, as dense kernels run them.
            max_bytes: Bytes of the tensors of the plain slim model, zeros included.
            pattern: Only subnetworks of this pattern.
            profile: Measurements by ``cocktail-cli bench`` on the device: a file, or a profile that was read from one.
            batch_size: The batch size that ``max_latency_ms`` is for. Default: the smallest in the profile.
            metric_mode: ``"max"`` if a larger metric is better, ``"min"`` if a smaller one is.

        Raises:
            SubnetError: No subnetwork is within the budget; names the nearest one and its costs.
            CocktailError: A profile is needed and missing, or was measured on other subnetworks.
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
    *,
    score: ScoreLike | Mapping[str, ScoreLike] = "magnitude",
    calibration: Iterable[Any] | None = None,
    loss_fn: LossFn | None = None,
    forward_fn: ForwardFn | None = None,
    sequential: bool = False,
) -> CocktailNet:
    """Make a model's sparse subnetworks: a mask for every pattern and level, from the current weights.

    This needs no training and does not change the model's weights. :class:`CoTrainer` then trains all subnetworks
    together.

    Which weights and channels go is decided by a score. Magnitudes need no data. On language models they are poor
    guides: there, give ``score="wanda"`` and some calibration text.

    Args:
        model: Any module that ``torch.export`` can trace, fully or in part.
        patterns: Names (``"unstructured"``), spec strings (``"2:4"``, ``"channel@0.3"``) or pattern objects.
        example_inputs: Positional arguments of one forward pass, or a single tensor. Default: an adapter makes them.
        example_kwargs: Keyword arguments of the same pass.
        target_modules: The modules that may be pruned: a regular expression that matches the whole path, or a list of
            names and suffixes. Default: all convolution and linear weights, without the first convolution and the
            classifier.
        exclude_modules: The modules that may not, in the same forms. They also keep their output channels.
        score: What is ranked: ``"magnitude"``, ``"wanda"``, ``"sparsegpt"``, ``"taylor"``, ``"fisher"``,
            ``"activation"`` (channels, heads), a score of your own, or a mapping from patterns' names to scores, with
            ``"*"`` for all other patterns. See :mod:`cocktailsdk.patterns.scores`.
        calibration: A loader or list of batches, of the forms that training takes, without which only magnitudes can be
            scores. All of it is used; 128 examples are usual. Padding tokens do not count.
        loss_fn: ``loss_fn(output, target)`` for scores that need the loss. Default: the loss in the model's output.
        forward_fn: ``forward_fn(model, batch) -> (output, target)``. Default: batches are used as in training.
        sequential: Whether single weights are judged block by block, on what the pruned blocks before return. This
            takes two more passes of the data for each such subnetwork. It needs a model whose blocks follow one
            another, as transformers' do. Default: one pass of the dense model for all.

    Raises:
        PatternError: A pattern or score is unknown or finds nothing to prune, or a selection matches no module. Or a
            score is not defined for its pattern, needs data that is not given, or sees activations that are not finite.
            If a pattern can touch less than a tenth of the weights, or a level removes nothing, a warning is logged.
        AdapterError: No example inputs were given, and no adapter can make them.
        ExportFailed: The model cannot be traced on the example inputs.
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
    scores = net.calibrate(score, calibration, loss_fn, forward_fn, sequential)
    umg = net.umg()
    for name, mask in make_all_masks(chosen, coupling, eligible, umg.values, scores).items():
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

    No code from the files is run. Everything is checked before the model is changed. If this raises, the model is as it
    was.

    Args:
        path: The bundle's folder. If there is no such folder, the bundle's name on the Hugging Face hub
            (``"user/name"``).
        model: A model of the class and configuration that the bundle was made from. Its weights are replaced in place,
            on their device. Leave it out if the bundle records how to build the model. This works for the
            :mod:`listed <cocktailsdk.records>` classes of timm, torchvision and transformers, in tested versions.
        subnets: Names of the subnetworks to read. Default: all. What other subnetworks have of their own (masks,
            statistics, private tensors) is not read from the disk, and the net cannot switch to them.
        trust_build_record: Without a model, build any class of timm, torchvision and transformers that the bundle
            records, in any version. Set this for bundles of your own. Hub access, remote code and pickle stay off.
        revision: A branch, tag or commit of the repository on the hub.
        token: The access token for the hub. Default: the token that the hub's client has stored.
        cache_dir: The folder in which the hub's client caches downloads.
        force_download: Whether to download files again that are in the cache.
        local_files_only: Whether to use the cache only, and download nothing.

    Returns:
        A net with the dense network active.

    Raises:
        BundleError: The bundle is damaged, of an unknown version, of an unregistered pattern, or of another model. Or
            it is neither here nor on the hub, or the hub cannot be reached.
        SubnetError: The bundle has no subnetwork of a name in ``subnets``.
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
