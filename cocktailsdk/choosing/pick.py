"""The best subnetwork within a budget."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from os import PathLike

from ..errors import CocktailError, PatternError, SubnetError
from ..net.costs import SubnetReport
from ..net.subnet_model import SubnetModel
from ..utils.nearest import shown
from .deployed_size import deployed_bytes
from .profile import DeviceProfile, read_profile

__all__ = ["pick"]

UNITS = {"max_latency_ms": "ms", "max_flops": "FLOPs", "max_bytes": "bytes"}


@dataclass(frozen=True)
class _Candidate:
    report: SubnetReport
    takes: dict[str, float]

    def excess(self, limits: dict[str, float]) -> float:
        """How many times too much it takes, of whatever is worst."""
        return max((self.takes[k] / v if v else float("inf") for k, v in limits.items()), default=0.0)


def pick(
    net: SubnetModel,
    *,
    max_latency_ms: float | None = None,
    max_flops: float | None = None,
    max_bytes: float | None = None,
    pattern: str | None = None,
    profile: DeviceProfile | str | PathLike[str] | None = None,
    batch_size: int | None = None,
    metric_mode: str = "max",
) -> str:
    """The best subnetwork within a budget; see :meth:`cocktailsdk.CocktailNet.pick`."""
    if metric_mode not in ("max", "min"):
        raise CocktailError(f"metric_mode is 'max' or 'min', not {metric_mode!r}")
    asked = {"max_latency_ms": max_latency_ms, "max_flops": max_flops, "max_bytes": max_bytes}
    limits = {k: float(v) for k, v in asked.items() if v is not None}
    wrong = [f"{k}={v:g}" for k, v in limits.items() if not v > 0]
    if wrong:
        raise CocktailError(f"a budget is a number above 0, not {', '.join(wrong)}")
    reports = [r for r in net.subnets() if pattern is None or r.pattern == pattern]
    if not reports:
        patterns = dict.fromkeys(r.pattern for r in net.subnets())
        near = difflib.get_close_matches(str(pattern), patterns, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise PatternError(f"no subnet has the pattern {shown(pattern)}; there are {', '.join(patterns)}{hint}")
    measured = None
    if max_latency_ms is not None:
        if profile is None:
            raise CocktailError(
                "max_latency_ms is about a machine: give profile=, the file that cocktail-cli bench BUNDLE wrote there"
            )
        measured = profile if isinstance(profile, DeviceProfile) else read_profile(profile)
    candidates = [_Candidate(r, _takes(net, r, limits, measured, batch_size)) for r in reports]
    allowed = [c for c in candidates if c.excess(limits) <= 1]
    if not allowed:
        raise SubnetError(_nothing(candidates, limits, pattern))
    sign = 1.0 if metric_mode == "max" else -1.0

    def goodness(c: _Candidate) -> tuple[bool, float, int, int, int]:
        r = c.report
        metric = r.metric if r.metric is not None and r.metric == r.metric else None  # NaN is no metric
        return metric is not None, sign * (metric or 0.0), r.nonzero_macs, r.params, -r.flops

    return max(allowed, key=goodness).report.name


def _takes(
    net: SubnetModel,
    report: SubnetReport,
    limits: dict[str, float],
    profile: DeviceProfile | None,
    batch_size: int | None,
) -> dict[str, float]:
    takes: dict[str, float] = {}
    if "max_flops" in limits:
        takes["max_flops"] = float(report.flops)
    if "max_bytes" in limits:
        takes["max_bytes"] = float(deployed_bytes(net, report.name))
    if profile is not None:
        cost = profile.cost(report.name)
        if cost is None or cost.flops != report.flops:
            found = "does not have it" if cost is None else f"has one of {cost.flops} FLOPs, here it has {report.flops}"
            raise CocktailError(
                f"the profile was measured on other networks: of {report.name!r} it {found}. Measure again with "
                "cocktail-cli bench BUNDLE"
            )
        takes["max_latency_ms"] = cost.timing(batch_size).latency_ms
    return takes


def _nothing(candidates: list[_Candidate], limits: dict[str, float], pattern: str | None) -> str:
    best = min(candidates, key=lambda c: c.excess(limits))
    took = ", ".join(f"{best.takes[k]:,.4g} {UNITS[k]} ({best.takes[k] / v:.2f} times {k})" for k, v in limits.items())
    budget = ", ".join(f"{k}={v:,.4g}" for k, v in limits.items())
    of = f" of pattern {pattern!r}" if pattern else ""
    return f"no subnet{of} is within {budget}; the nearest is {best.report.name!r} with {took}"
