"""The command line's outermost layer: every wrong command line ends in one line, and pipes may close."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import Any

import typer
from typer.core import TyperGroup

from .console import INTERRUPTED, error_line

__all__ = ["Group"]

PIPE_CLOSED = 141
"""Exit code where a reader closed the pipe, as shells have it (128 + SIGPIPE)."""

# typer 0.20 and newer brings its own copy of click, and older ones import it. So the classes have no common name to
# import, but typer.BadParameter derives from the one that typer raises.
_UsageProblem: type[Any] = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")


class Group(TyperGroup):
    """Prints errors as one line on standard error, where typer would draw a box."""

    def main(self, args: Any = None, prog_name: str | None = None, **extra: Any) -> Any:  # type: ignore[override]
        """Run a command line; see ``click.Command.main``."""
        if not extra.pop("standalone_mode", True):
            return super().main(args, prog_name, standalone_mode=False, **extra)
        arguments = sys.argv[1:] if args is None else list(args)
        _printable()
        try:
            _check_arguments(arguments)
            code = super().main(arguments, prog_name, standalone_mode=False, **extra)
            _flush()
        except _UsageProblem as error:
            if type(error).__name__ == "NoArgsIsHelpError":  # click 8.2 and newer: its message is the help
                error.show()
            else:
                where = getattr(error, "ctx", None)
                hint = f"; see {where.command_path} --help" if where is not None else ""
                error_line(error.format_message().rstrip(".") + hint)
            code = error.exit_code
        except BrokenPipeError:
            code = _pipe_closed()
        except OSError as error:  # of the last flush: a full disk, say
            error_line(f"standard output: {error}")
            code = 1
        except (KeyboardInterrupt, EOFError, typer.Abort):
            code = INTERRUPTED
        sys.exit(code if isinstance(code, int) else 0)


def _check_arguments(arguments: list[str]) -> None:
    """See that no argument is one that stands for nothing: an empty path would be the current folder."""
    for i, argument in enumerate(arguments, 1):
        before = f"after {arguments[i - 2]} " if i > 1 else ""
        if not argument.strip():
            raise typer.BadParameter(f"argument {i} {before}is empty: give a value, or leave it out")
        if "\0" in argument:
            raise typer.BadParameter(f"argument {i} {before}holds a NUL character: {argument!r}")


def _printable() -> None:
    """Make standard streams take any character: terminals may know fewer than the tables use."""
    for name in ("stdout", "stderr"):
        stream: Any = getattr(sys, name)
        if stream is None:  # the shell closed it (>&-)
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif hasattr(stream, "reconfigure"):
            with contextlib.suppress(ValueError, OSError):
                stream.reconfigure(errors="replace")


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(ValueError):  # closed already
            stream.flush()


def _pipe_closed() -> int:
    """Keep Python's own flush at the end from failing once more."""
    # Python flushes standard output at its end, and would print "Exception ignored … BrokenPipeError".
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return PIPE_CLOSED
