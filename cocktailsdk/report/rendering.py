"""HTML from the templates in ``templates/``, by Jinja."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from ..printable import printable

if TYPE_CHECKING:
    from jinja2 import Environment

__all__ = ["asset", "render"]


def render(template: str, **values: Any) -> str:
    """A template's text. Every value is escaped: it may come from a stranger's run.

    Args:
        template: A file's name in ``templates/``.
        **values: What the template names.
    """
    return _environment().get_template(template).render(values)


def asset(name: str) -> str:
    """A file of ``templates/`` as it is: styles and scripts, whose braces are not Jinja's."""
    return files(__package__).joinpath("templates", name).read_text(encoding="utf-8")


@cache
def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined  # late: only pages need it

    return Environment(
        loader=PackageLoader(str(__package__)),
        autoescape=True,
        finalize=_without_controls,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _without_controls(value: Any) -> Any:
    """A value before it is escaped. Markup, which macros return, has control characters replaced already."""
    return value if hasattr(value, "__html__") else printable(str(value))
