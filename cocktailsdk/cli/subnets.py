"""``cocktail-cli subnets``."""

from __future__ import annotations

from ..printable import printable
from .bundles import bundle_folder
from .console import command, log_to, messages, print_json, results
from .options import AsData, Bundle

__all__ = ["list_subnets"]


@command
def list_subnets(
    bundle: Bundle,
    as_json: AsData = False,
) -> None:
    """List the networks of a bundle, from what is stored: no model is built."""
    log_to(messages())
    folder = bundle_folder(bundle)

    from ..bundle.files import listed_subnets, model_class, read_meta
    from ..bundle.private_entries import private_bytes
    from ..utils.score_text import score_text

    _, meta = read_meta(folder)
    subnets, made_from, private = listed_subnets(meta), model_class(meta), private_bytes(meta)
    score = (meta.get("provenance") or {}).get("score")  # bundles of version 1 have no provenance
    ranked = printable(score_text(score))
    size = sum(f["bytes"] for f in meta["files"].values())
    if as_json:
        rows = [{**s, "private_bytes": private[s["name"]]} if s["name"] in private else s for s in subnets]
        print_json({"bundle": str(folder), "model": made_from, "subnets": rows, **({"score": score} if ranked else {})})
        return
    from rich.text import Text

    from ..report.numbers import bytes_text
    from ..report.tables import STYLES, plain_table

    own = ["private tensors"] if private else []
    table = plain_table("network", "pattern", "sparsity", "held-out metric", *own, right=(2, 3, *(4 for _ in own)))
    for s in subnets:
        metric = s.get("metric")
        table.add_row(
            Text(printable(s["name"]), style=STYLES.get(s["pattern"], "")),
            printable(s["pattern"]),
            f"{s['sparsity']:.3f}",
            f"{metric:.4f}" if isinstance(metric, float | int) else "–" if metric is None else metric,
            *(bytes_text(private[s["name"]]) if s["name"] in private else "–" for _ in own),
        )
    screen = results()
    screen.print(table)
    screen.print(f"\n{len(subnets)} networks of {made_from} in {bytes_text(size)}")
    if ranked:
        screen.print(f"masks ranked by {ranked}", markup=False, highlight=False, soft_wrap=True)
