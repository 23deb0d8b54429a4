"""A run as it goes: a view that is drawn anew on terminals, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import zip_longest
from types import TracebackType
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from ..patterns import Subnet
from ..training import events
from ..utils.grouping import grouped
from .need import need_line
from .numbers import count_text, duration_text, percent_text
from .progress import Progress
from .tables import STYLES

__all__ = ["LineView", "LiveView", "RunView", "run_view_for"]


class LiveView:
    """Round, epoch, step rate, time left and the networks' latest metrics, drawn four times a second."""

    def __init__(self, console: Console, title: str, subnets: Sequence[Subnet]) -> None:
        self._console, self._title, self._subnets = console, title, subnets
        self._patterns = {s.name: s.pattern for s in subnets}
        self.progress = Progress()
        self._live = Live(console=console, refresh_per_second=4, get_renderable=self.picture)

    def __call__(self, event: events.Event) -> None:
        """Take an event; what is drawn follows by itself."""
        self.progress.take(event)
        if isinstance(event, events.Saved) and event.interrupted:
            self.note(f"state saved in {event.path.parent}")

    def __enter__(self) -> Self:
        """Begin drawing."""
        self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Draw a last time and leave that standing."""
        self._live.stop()

    def note(self, text: str) -> None:
        """Say a line above the view."""
        self._live.console.print(Text(text))

    def picture(self) -> RenderableType:
        """What is drawn now."""
        p = self.progress
        head = Table.grid(expand=True)
        head.add_column()
        head.add_column(justify="right")
        head.add_row(Text(self._title, style="bold"), Text(p.headline()))
        bar = Table.grid(expand=True, padding=(0, 1, 0, 0))
        bar.add_column(ratio=1)
        bar.add_column(justify="right", min_width=6)
        bar.add_row(ProgressBar(total=1.0, completed=p.share), percent_text(p.share, 0))
        lines = [self._figures()]
        if p.need is not None and p.phase == "training":
            lines.append(need_line(p.need, self._patterns))
        return Group(head, bar, *(Text(line, style="dim") for line in lines), Text(), self._metrics())

    def _figures(self) -> str:
        p = self.progress
        figures = [f"{duration_text(p.elapsed)} gone"]
        if p.remaining is not None:
            figures.append(f"{duration_text(p.remaining)}{' of training' * (p.phase == 'training')} left")
        if p.phase == "training":
            figures.append(f"step {p.done_steps:,} of {p.total_steps:,}")
            figures.append(f"{p.rate:.1f} steps/s")
        elif p.alphas:
            figures.append(f"alpha {' '.join(f'{a:g}' for a in p.alphas.values())}")
        return " · ".join(figures)

    def _metrics(self) -> RenderableType:
        """The latest held-out metrics, a column for each pattern; before there are any, the losses."""
        p = self.progress
        known, what = (p.metrics, "held out") if p.metrics else (p.losses, "loss")
        columns = grouped((s.pattern, s) for s in self._subnets)
        table = Table(box=None, pad_edge=False, expand=False, header_style="bold", padding=(0, 3, 0, 0))
        for pattern in columns:
            head = f"{pattern} ({what})" if pattern == "dense" else pattern
            table.add_column(Text(head, style=STYLES.get(pattern, "")))
        for row in zip_longest(*columns.values()):
            cells = []
            for subnet in row:
                if subnet is None:
                    cells.append(Text())
                    continue
                name = subnet.name
                label = name.partition("@")[2] or ("" if name == "dense" else name)
                value = f"{known[name]:.4f}" if name in known else "·"
                cells.append(Text.assemble((f"{label:<6}" if label else "", "dim"), value))
            table.add_row(*cells)
        return table


class LineView:
    """A line for each round and, throttled, for what goes on within it; for log files and pipes.

    Args:
        console: Where to.
        title: What is trained.
        every: Least seconds between two lines within a round.
        clock: Seconds, monotonic.
        subnets: The networks, whose passes are added up by pattern.
    """

    def __init__(
        self,
        console: Console,
        title: str,
        every: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
        subnets: Sequence[Subnet] = (),
    ) -> None:
        self._console, self._title, self._every, self._clock = console, title, every, clock
        self._patterns = {s.name: s.pattern for s in subnets}
        self.progress = Progress(clock)
        self._last_line = clock()

    def __enter__(self) -> Self:
        """Say what begins."""
        self.note(self._title)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Nothing is left to draw."""

    def note(self, text: str) -> None:
        """Say a line."""
        self._console.print(Text(text), soft_wrap=True)
        self._last_line = self._clock()

    def __call__(self, event: events.Event) -> None:
        """Take an event; say it, or what it leads to, where it is time to."""
        p = self.progress
        p.take(event)
        match event:
            case events.TrainingStarted():
                how = "going on" if event.resumed or event.done_steps else "starting"
                after = " after the dense one" if event.first_round == 0 else ""
                rounds = f"{event.rounds} round{'s' * (event.rounds != 1)}{after}"
                self.note(f"{how}: {rounds}, step {event.done_steps:,} of {event.total_steps:,}")
            case events.RoundStarted():
                self.note(f"round {event.round}: {', '.join(('dense', *event.networks))}, {event.epochs} epochs")
            case events.NeedMeasured():
                self.note(f"step {event.step:,}: {need_line(event, self._patterns)}")
            case events.RoundEnded():
                shown = ", ".join(f"{n} {m:.4f}" for n, m in event.metrics.items())
                self.note(f"round {event.round} ended{': ' * bool(shown)}{shown}")
            case events.MergeStarted():
                self.note(f"merging {event.rounds} rounds, {count_text(event.candidates)} candidates")
            case events.AlphaChosen():
                self.note(f"round {event.round} merged: alpha {event.alpha:g}, held-out mean {event.metric:.4f}")
            case events.Finished():
                self.note(f"trained in {duration_text(event.seconds)}")
            case events.Saved():
                if event.interrupted:
                    self.note(f"state saved in {event.path.parent}")
            case (
                events.StepDone()
                | events.EpochEnded()
                | events.MergeProgress()
                | events.HeadRefitted()
                | events.NetworkFinished()
            ):
                if self._clock() - self._last_line >= self._every:
                    remaining = "" if p.remaining is None else f", {duration_text(p.remaining)} left"
                    rate = f", {p.rate:.1f} steps/s" if p.phase == "training" else ""
                    self.note(f"{p.headline()} ({percent_text(p.share, 0)}{rate}{remaining})")


RunView = LiveView | LineView
"""What draws a run: a callback for :class:`~cocktailsdk.CoTrainer`, and a context to draw in."""


def run_view_for(console: Console, title: str, subnets: Sequence[Subnet]) -> RunView:
    """The view that suits a console.

    Args:
        console: Where to.
        title: What is trained.
        subnets: The networks, the dense one first.
    """
    return LiveView(console, title, subnets) if console.is_terminal else LineView(console, title, subnets=subnets)
