"""Tables of what networks cost on a machine, for terminals."""

from __future__ import annotations

from collections.abc import Iterable

from rich.table import Table
from rich.text import Text

from ..choosing.layer_use import LayerUse
from ..choosing.profile import DeviceProfile, pareto_front
from .numbers import bytes_text, count_text, percent_text, shape_text
from .tables import STYLES, plain_table

__all__ = ["costs_table", "layers_table"]


def costs_table(profile: DeviceProfile, batch: int) -> Table:
    """Every network at one batch size, beside the dense one."""
    with_metric = any(n.metric is not None for n in profile.networks)
    with_memory = any(n.timing(batch).memory_bytes is not None for n in profile.networks)
    heads = [*(["metric"] if with_metric else []), "FLOPs", "bytes", *(["peak\nmemory"] if with_memory else [])]
    columns = ["network", *heads, "ms", "a second", "x dense"]
    table = plain_table(*columns, "hardware uses", right=range(1, len(columns)), title=f"batch {batch}")
    dense = profile.networks[0].timing(batch).latency_ms
    front = pareto_front(profile.networks, batch)
    pattern = None
    for n in profile.networks:
        if pattern is not None and n.pattern != pattern:
            table.add_row()
        pattern, t = n.pattern, n.timing(batch)
        cells = [] if not with_metric else ["–" if n.metric is None else f"{n.metric:.4f}"]
        cells += [count_text(n.flops), bytes_text(n.bytes)]
        if with_memory:
            cells.append("–" if t.memory_bytes is None else bytes_text(t.memory_bytes))
        cells += [f"{t.latency_ms:.2f}", count_text(t.throughput), f"{dense / t.latency_ms:.2f}"]
        mark = "* " if n.name in front else "  "
        used = ", ".join(f"{count} {what}" for what, count in n.used.items())
        table.add_row(Text(mark + n.name, style=STYLES.get(n.pattern, "magenta")), *cells, used)
    return table


def layers_table(name: str, layers: Iterable[LayerUse]) -> Table:
    """What the hardware uses of every layer's sparsity."""
    table = plain_table("weight", "dense", "as run", "zeros", "MACs", "used", right=(1, 2, 3, 4), title=name)
    for layer in layers:
        table.add_row(
            layer.weight,
            shape_text(layer.shape_dense),
            shape_text(layer.shape) if layer.shape else "–",
            percent_text(layer.zeros, 0) if layer.zeros else "",
            percent_text(layer.macs / layer.macs_dense, 0) if layer.macs_dense else "",
            layer.used,
        )
    return table
