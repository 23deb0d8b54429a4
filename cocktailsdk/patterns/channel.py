"""Channel sparsity: whole units of coupled channels, the same share of every group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

from ..errors import PatternError
from ..graph import Coupling, Group
from ..masks import Mask
from .base import UMG, Subnet
from .registry import register_pattern
from .unit_groups import stream_groups
from .unit_patterns import UnitPattern


@register_pattern("channel")
class Channel(UnitPattern):
    """Removes the same share of channel units from every group (paper, Section 3.2), nested over its levels.

    Of a group's n units exactly ``round(sparsity * n)`` go, never all. About ``1 - (1 - sparsity)²`` of the weights
    go with them.

    Args:
        sparsities: Ascending, in [0, 1]; by default ``1 - (1 - rate)^k`` for k = 1 … rounds.
        rounds: Number of default levels.
        rate: Share of the kept units that each default level removes.
        beta: Weight of the unstructured mask in the score; the N:M mask has the rest.
        round_to: Channels kept are rounded to a multiple of this; ``"auto"``: 8 in groups of 256 channels and more.
        scope: ``"group"``: the same share of every group. ``"global"``: the units of all groups are ranked together,
            each by its score divided by the mean of its group's. Exactly ``round(sparsity * n)`` of all n units go,
            never all of a group. ``round_to`` is applied to each group afterwards.
        include_stream: Whether the residual stream of a transformer loses channels too
            (:func:`cocktailsdk.patterns.unit_groups.stream_groups`). One channel of it runs through every layer and
            enters the statistics of every layer norm, so it costs more accuracy than any other. Streams with batch
            norms, as those of ResNets, always lose channels.

    Raises:
        PatternError: An argument makes no sense; when masks are made, that all channels that can go are such a stream.
    """

    def __init__(
        self,
        sparsities: Sequence[float] | None = None,
        rounds: int = 10,
        rate: float = 0.1,
        beta: float = 0.8,
        round_to: int | str | None = "auto",
        scope: str = "group",
        include_stream: bool = False,
    ) -> None:
        super().__init__(sparsities, rounds, rate, beta, round_to, scope)
        if not isinstance(include_stream, bool):
            raise PatternError(f"channel: include_stream must be True or False, not {include_stream!r}")
        self.include_stream = include_stream

    def groups(self, coupling: Coupling) -> tuple[Group, ...]:
        """All channel groups, without the residual streams of transformers where these stay whole."""
        if self.include_stream:
            return coupling.groups
        streams = {g.name for g in stream_groups(coupling)}
        return tuple(g for g in coupling.groups if g.name not in streams)

    def nothing(self, coupling: Coupling) -> str | None:
        """Why no channel can go, where a stream is the reason; other reasons are given for all patterns alike."""
        if not coupling.groups:
            return None
        return (
            "the only channels of this model that can go are a transformer's residual stream "
            f"({coupling.groups[0].name!r}), which stays whole by default; write Channel(include_stream=True)"
        )

    def coverage(self, subnet: Subnet, mask: Mask, umg: UMG) -> float:
        """The share of the eligible weights that its groups touch; 1 where it leaves out no group."""
        if len(self.groups(umg.coupling)) == len(umg.coupling.groups):
            return 1.0
        return super().coverage(subnet, mask, umg)

    def config(self) -> dict[str, Any]:
        """What :meth:`from_config` makes an equal pattern from."""
        # Bundles of before do not say it: there streams lost channels.
        return {**super().config(), **({} if self.include_stream else {"include_stream": False})}

    def config_on(self, coupling: Coupling) -> dict[str, Any]:
        """:meth:`config`; of a model without a transformer's stream it does not say what becomes of one."""
        config = self.config()
        return config if stream_groups(coupling) else {k: v for k, v in config.items() if k != "include_stream"}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """The pattern that :meth:`config` came from; one of before ``include_stream`` narrows streams too."""
        return cls(**{"include_stream": True, **config})

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1]}{', include_stream=True' if self.include_stream else ''})"
