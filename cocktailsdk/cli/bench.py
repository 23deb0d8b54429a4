"""``cocktail-cli bench``."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ..errors import CocktailError
from ..utils.optional import check_installed
from .bundles import bundle_folder
from .checks import check_device, check_subnets, output_file
from .console import command, log_to, messages, print_json, results
from .options import AsData, Bundle, Device, Model, TrustBuildRecord, networks

__all__ = ["bench_bundle"]


class Runtime(StrEnum):
    """What runs the networks."""

    TORCH = "torch"
    ONNXRUNTIME = "onnxruntime"
    OPENVINO = "openvino"


@command
def bench_bundle(
    bundle: Bundle,
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="NAME…",
            help="Which networks besides the dense one; all if none.",
            show_default=False,
            autocompletion=networks,
        ),
    ] = None,
    model: Model = None,
    trust_build_record: TrustBuildRecord = False,
    batch: Annotated[
        list[int] | None,
        typer.Option("--batch", min=1, max=2**20, help="Examples in a batch; may be repeated.", show_default="1 and 8"),
    ] = None,
    runtime: Annotated[Runtime, typer.Option(help="What runs the networks.")] = Runtime.TORCH,
    repeats: Annotated[int, typer.Option(min=1, max=10**6, help="Timed runs of each network and batch size.")] = 20,
    threads: Annotated[
        int | None, typer.Option(min=1, max=4096, help="Processor threads.", show_default="PyTorch's own choice")
    ] = None,
    device: Device = None,
    layers: Annotated[
        bool, typer.Option("--layers", help="Say for every layer what the hardware uses of its sparsity.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="Where the device profile goes.", show_default="BUNDLE.profile.json")
    ] = None,
    as_json: AsData = False,
) -> None:
    """Measure every network of a bundle on this machine, and save what was found as a device profile.

    With NAMEs, an earlier profile keeps its other networks; it must have been measured with the same settings.
    """
    console = messages()
    log_to(console)
    folder = bundle_folder(bundle)
    check_subnets(folder, names or [])
    target = out if out is not None else folder.with_name(f"{folder.name}.profile.json")
    output_file(target, "--out")
    if runtime is not Runtime.TORCH:
        check_installed(runtime.value, purpose=f"--runtime {runtime.value}")
        if device not in (None, "cpu"):
            raise CocktailError(f"--device {device} does not apply to --runtime {runtime.value}, which runs on the CPU")
    check_device(device)

    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from ..choosing import bench, layers_used, read_profile
    from ..utils.undo import computing_threads
    from .nets import load_net

    keep = read_profile(target) if names and target.is_file() else None

    net = load_net(bundle, model, trust_build_record)
    if device is not None:
        net.to(device)
    columns = (
        BarColumn(),
        TextColumn("{task.percentage:.0f} %"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[what]}"),
    )
    bars = Progress(*columns, console=console, transient=True)
    bar = bars.add_task("", total=None, what="")

    def shown(done: int, total: int, what: str) -> None:
        bars.start()  # once there is something to show: what is refused before is one line
        bars.update(bar, completed=done, total=total, what=what)

    try:
        with computing_threads(threads):
            profile = bench(
                net,
                names,
                batch_sizes=batch or (1, 8),
                runtime=runtime.value,
                repeats=repeats,
                keep=keep,
                progress=shown,
            )
    finally:
        if bars.live.is_started:
            bars.stop()
    file = profile.write(target)
    uses = {n.name: layers_used(net, n.name) for n in profile.networks} if layers else {}
    if as_json:
        from dataclasses import asdict

        print_json(
            {
                "bundle": str(folder),
                "profile": str(file),
                **profile.to_dict(),
                **({"layers": {n: [asdict(u) for u in use] for n, use in uses.items()}} if layers else {}),
            }
        )
        return
    from ..report.costs import costs_table, layers_table

    screen = results()
    for at, size in enumerate(t.batch for t in profile.networks[0].timings):
        if at:
            screen.print()
        screen.print(costs_table(profile, size))
    for name, use in uses.items():
        screen.print()
        screen.print(layers_table(name, use))
    machine = profile.machine
    screen.print(
        f"\n{profile.runtime} on {machine.get('processor', '?')} ({machine.get('device', '?')}), threads: "
        f"{profile.threads}; medians of {profile.repeats} runs by turns; * on the Pareto front",
        soft_wrap=True,
    )
    screen.print(f"profile: {file}", soft_wrap=True)
