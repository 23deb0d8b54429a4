"""``cocktail-cli export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import CocktailError
from .bundles import bundle_folder
from .checks import check_format, check_subnets, input_folder, output_file
from .console import command, log_to, messages, print_json, results
from .options import AsData, Bundle, Model, TrustBuildRecord, networks

__all__ = ["export_subnet"]


@command
def export_subnet(
    bundle: Bundle,
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME", help="The network, like channel@0.613.", show_default=False, autocompletion=networks
        ),
    ],
    path: Annotated[
        Path,
        typer.Argument(
            metavar="PATH", help="The file; .onnx, .xml (OpenVINO), .pt2 or .safetensors.", show_default=False
        ),
    ],
    model: Model = None,
    trust_build_record: TrustBuildRecord = False,
    int8: Annotated[
        bool, typer.Option("--int8", help="Quantize with the runtime's own quantizer, calibrated on the training data.")
    ] = False,
    data: Annotated[
        Path | None, typer.Option(help="Folder of the preset's images, for --int8.", show_default=False)
    ] = None,
    fixed_batch: Annotated[
        bool, typer.Option("--fixed-batch", help="The example's batch size only, instead of any.")
    ] = False,
    as_json: AsData = False,
) -> None:
    """Write one network for another runtime, and check it there. If anything fails, no file is left."""
    log_to(messages())
    folder = bundle_folder(bundle)
    if data is not None and not int8:
        raise CocktailError("--data is for --int8, which calibrates on it: give --int8 too, or leave --data out")
    check_format(path, int8=int8, fixed_batch=fixed_batch)
    output_file(path, "PATH")
    check_subnets(folder, [name])
    if data is not None:
        input_folder(data, "--data")

    from ..exporting import format_of
    from .nets import load_net, preset_batches

    format_of(path)  # before anything is built
    options = preset_batches(bundle, data) if int8 else {}
    net = load_net(bundle, model, trust_build_record)
    report = net.export(name, path, int8=int8, dynamic_batch=not fixed_batch, **options)
    if as_json:
        print_json(report.to_dict())
        return
    screen = results()
    for line in report.lines():
        screen.print(line, soft_wrap=True)
