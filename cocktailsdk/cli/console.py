"""Where commands write to, and how they fail."""

from __future__ import annotations

import functools
import json
import logging
import os
import sys
from collections.abc import Callable, Iterable
from typing import Any, ParamSpec, TypeVar

import typer
from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from ..errors import CocktailError
from ..printable import printable
from ..report.numbers import json_values

__all__ = ["INTERRUPTED", "TERMINATED", "command", "error_line", "log_to", "messages", "print_json", "results"]

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""
TERMINATED = 143
"""Exit code after SIGTERM, as shells have it."""

# typer steers itself by these exceptions; its ClickException has no name to import, see group.py.
_STEERING = (typer.Exit, typer.Abort, *(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException"))

P = ParamSpec("P")
R = TypeVar("R")


class _Console(Console):
    """A console that prints no control characters of texts: names in a stranger's bundle may hold terminal escapes."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Segments of printable text; rich marks the segments that hold its own control codes (a live view's)."""
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else printable(text), style, control)


def results() -> Console:
    """Standard output: tables. Without colour where it is no terminal, or where NO_COLOR is set."""
    return _Console(highlight=False, markup=False, emoji=False)


def messages(*, main_process_only: bool = False) -> Console:
    """Standard error: progress, warnings and errors.

    Args:
        main_process_only: Whether others of several processes (``torchrun`` numbers them in ``RANK``) stay silent.
    """
    quiet = main_process_only and os.environ.get("RANK", "0") != "0"
    return _Console(stderr=True, highlight=False, markup=False, emoji=False, quiet=quiet)


def print_json(value: Any) -> None:
    """JSON on standard output, and nothing else."""
    sys.stdout.write(json.dumps(json_values(value), indent=1, allow_nan=False) + "\n")


MOST = 300
"""Characters of an error's line: longer ones lose their middle."""
TRACEBACK = "COCKTAIL_TRACEBACK"
"""Set in the environment, errors that nobody expected keep their traceback."""


def error_line(message: str) -> None:
    """Print one line about what went wrong, whatever the message holds."""
    line = " ".join("".join(c if c.isprintable() or c.isspace() else repr(c)[1:-1] for c in message).split())
    if len(line) > MOST:
        line = f"{line[: MOST * 3 // 5]} … {line[-MOST * 2 // 5 :]}"
    messages().print(Text.assemble(("error: ", "bold red"), line), soft_wrap=True)


def command(function: Callable[P, R]) -> Callable[P, R]:
    """Errors become one line and exit code 1; Ctrl-C becomes 130.

    What nobody expected, from a model's own code say, keeps its traceback where ``COCKTAIL_TRACEBACK`` is set.
    """

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except BrokenPipeError:
            raise
        except (CocktailError, OSError) as error:
            error_line(str(error))
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            raise typer.Exit(INTERRUPTED) from None
        except Exception as error:
            if TRACEBACK in os.environ or isinstance(error, _STEERING):
                raise
            error_line(f"{type(error).__name__}: {error} (set {TRACEBACK}=1 to see where)")
            raise typer.Exit(1) from None

    return run


class _Lines(logging.Handler):
    """Log lines as messages; through a console, so that a live view on it stays whole."""

    def __init__(self, console: Console) -> None:
        super().__init__(logging.WARNING)
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        """Print a record."""
        level = record.levelname.lower()
        self._console.print(Text(f"{level}: {record.getMessage()}", style="yellow"), soft_wrap=True)


def log_to(console: Console) -> None:
    """Send this package's warnings to a console instead of Python's default."""
    logger = logging.getLogger("cocktailsdk")
    for handler in [h for h in logger.handlers if isinstance(h, _Lines)]:
        logger.removeHandler(handler)
    logger.addHandler(_Lines(console))
