"""What a net can do for deployment: be exported, and be chosen from by budget."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from os import PathLike
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor

if TYPE_CHECKING:
    from .choosing import DeviceProfile
    from .exporting import ExportReport
    from .net import CocktailNet


class Deployable:
    """The methods of :class:`~cocktailsdk.CocktailNet` that need other runtimes or measurements."""

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
        from .switchable import model_unchanged

        net = cast("CocktailNet", self)
        with model_unchanged(net):
            return export_subnet(
                net,
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
            cast("CocktailNet", self),
            max_latency_ms=max_latency_ms,
            max_flops=max_flops,
            max_bytes=max_bytes,
            pattern=pattern,
            profile=profile,
            batch_size=batch_size,
            metric_mode=metric_mode,
        )
