"""Names to models, and models to example inputs.

What is particular to a model library lives in an adapter: any package can ship one and name it under the entry point
group ``cocktailsdk.adapters``. Those for timm, transformers and torchvision come with this package.
"""

from __future__ import annotations

import difflib
import importlib
import logging
import os
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from .errors import AdapterError
from .records import LIBRARIES, PASS, Bounds, check_record, check_version

if TYPE_CHECKING:
    from torch import nn

__all__ = [
    "GROUP",
    "Adapter",
    "Inputs",
    "LayersAdapter",
    "RecordAdapter",
    "SlimAdapter",
    "adapters",
    "after_slim",
    "build_model",
    "example_inputs_for",
    "rebuilt",
    "record_of",
    "without_elements",
]

log = logging.getLogger(__name__)

GROUP = "cocktailsdk.adapters"
"""The entry point group that adapters are found in."""

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of one forward pass."""

FORMS = (
    "a timm name (resnet50), hf:TYPE_OR_PATH (hf:bert), torchvision:NAME (torchvision:resnet18), "
    "or package.module:factory"
)


@runtime_checkable
class Adapter(Protocol):
    """What a model library's adapter offers. It is made without arguments, and should import its library late.

    Attributes:
        name: The library's name, unique among adapters.
    """

    name: str

    def owns(self, reference: str) -> bool:
        """Whether a reference is written in this adapter's form, whether or not such a model exists."""
        ...

    def build(self, reference: str, *, pretrained: bool = False) -> nn.Module:
        """The model, with random or trained weights.

        Raises:
            AdapterError: No such model, or its weights cannot be had.
        """
        ...

    def example_inputs(self, model: nn.Module) -> Inputs | None:
        """Inputs for one forward pass, batch size 1; ``None`` for a model that is not of this library."""
        ...

    def references(self) -> Iterable[str]:
        """All references that it can build, for suggestions; may be empty."""
        ...


@runtime_checkable
class SlimAdapter(Protocol):
    """What an adapter may offer besides: to look after a model of its library that has become slim."""

    def after_slim(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Called with every slim model, of whatever library, once it is shown to compute what the masked one does.

        It may change the model in place (a configuration that says its widths), but not what it computes, nor the names
        and values of its tensors.

        Args:
            model: The slim model, which nobody else has yet.
            args: Positional arguments of one forward pass, on the model's device.
            kwargs: Keyword arguments of that pass.
        """
        ...


@runtime_checkable
class LayersAdapter(Protocol):
    """What an adapter may offer besides: to number a model's layers anew when some of them are taken out."""

    def without_elements(self, model: nn.Module, container: str, kept: Sequence[int], total: int) -> None:
        """Called with a copy of a model, of whatever library, of which a list has lost elements.

        It changes what else says how many layers there are, or which of them a module is: configurations, and numbers
        by which a cache is read. The copy is compared with the masked model afterwards.

        Args:
            model: The copy, which nobody else has yet.
            container: Path of the ``ModuleList`` or ``Sequential``.
            kept: Where each of its elements was before.
            total: How many there were.
        """
        ...


@runtime_checkable
class RecordAdapter(Protocol):
    """What the adapters of this package offer besides: to say in JSON values how a model is built again.

    Bundles keep that, so that they load without a model given. Records come from files that anybody may have written,
    so only the adapters for timm, torchvision and transformers in this package are asked, and only with records that
    :mod:`cocktailsdk.records` allows. Bundles of other adapters' models are loaded into a model that the user passes.
    """

    def records(self, model: nn.Module) -> Iterable[Mapping[str, Any]]:
        """Records that may build an equal model, the likeliest first; none for a model that is not of this library."""
        ...

    def rebuild(self, record: Mapping[str, Any]) -> nn.Module:
        """The model of a record that was checked, with random weights.

        Raises:
            Exception: Any, where the record makes no sense.
        """
        ...


@cache
def adapters() -> Mapping[str, Adapter]:
    """Installed adapters by name. One that cannot be loaded is logged and left out."""
    found: dict[str, Adapter] = {}
    for point in sorted(entry_points(group=GROUP), key=lambda p: p.name):
        try:
            adapter = point.load()()
        except Exception as error:  # someone else's package must not break ours
            log.warning("adapter %r (%s) could not be loaded: %s", point.name, point.value, error)
            continue
        if not isinstance(adapter, Adapter):
            log.warning("adapter %r (%s) is no Adapter: it lacks a method or its name", point.name, point.value)
            continue
        found.setdefault(adapter.name, adapter)
    return found


def build_model(reference: str, pretrained: bool = False) -> nn.Module:
    """A model by its reference.

    Args:
        reference: A timm name (``resnet50``), ``hf:TYPE_OR_PATH`` (``hf:bert``), ``torchvision:NAME``, whatever an
            installed adapter owns, or ``package.module:factory``, where the factory is called without arguments and the
            module may lie in the current directory.
        pretrained: Whether to load trained weights; a factory then gets ``pretrained=True``.

    Raises:
        AdapterError: The reference names nothing; says what comes near.
    """
    for adapter in adapters().values():
        if adapter.owns(reference):
            return adapter.build(reference, pretrained=pretrained)
    if ":" in reference:
        return _from_factory(reference, pretrained)
    raise AdapterError(f"no model is named {reference!r}{suggestions(reference)}. A model is {FORMS}.")


def example_inputs_for(model: nn.Module) -> Inputs:
    """Inputs for one forward pass of a model, batch size 1.

    An attribute ``example_inputs`` of the model (a tensor, a tuple, a dict, or a method that gives one) comes first,
    then the adapters.

    Raises:
        AdapterError: Nobody knows.
    """
    own = getattr(model, "example_inputs", None)
    if own is not None:
        return _as_inputs(own() if callable(own) else own)
    for adapter in adapters().values():
        found = adapter.example_inputs(model)
        if found is not None:
            return found
    raise AdapterError(
        f"no example inputs are known for {type(model).__name__}; give them: example_inputs=(x,) or "
        "example_kwargs={...} in Python, --input-size on the command line, or an attribute 'example_inputs' of the "
        "model"
    )


def after_slim(model: nn.Module, example: Inputs) -> nn.Module:
    """Shows a slim model to every adapter that wants to see it. One that fails is logged, and breaks nothing.

    Returns:
        The model.
    """
    from .utils.devices import device_of
    from .utils.nested import to_device

    for name, adapter in adapters().items():
        if isinstance(adapter, SlimAdapter):
            args, kwargs = to_device(example, device_of(model))
            try:
                adapter.after_slim(model, args, kwargs)
            except Exception:  # someone else's package must not break ours
                log.warning("adapter %r failed on a slim %s", name, type(model).__name__, exc_info=True)
    return model


def without_elements(model: nn.Module, container: str, kept: Sequence[int], total: int) -> None:
    """Shows a copy of a model that has lost layers to every :class:`LayersAdapter`."""
    for adapter in adapters().values():
        if isinstance(adapter, LayersAdapter):
            adapter.without_elements(model, container, kept, total)


def record_of(model: nn.Module) -> dict[str, Any] | None:
    """How a model is built again, as JSON values; ``None`` where no adapter knows, or what it knows builds another.

    A record counts only if the model that it builds has the same modules, settings and tensors. One that the lists of
    :mod:`cocktailsdk.records` allow comes first; any other is read only where its maker is trusted.
    """
    return best_record(model)[0]


def best_record(model: nn.Module) -> tuple[dict[str, Any] | None, str | None]:
    """How a model is built again, and in words why that is not read from a bundle without trust, or not at all.

    Returns:
        The record, and the reason; ``None`` for the reason where the record is listed.
    """
    dtypes = {str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.is_floating_point()}
    if len(dtypes) > 1:
        return None, "its parameters have several dtypes"
    stored = {id(t): tuple(t.shape) for t in model.state_dict(keep_vars=True).values() if hasattr(t, "shape")}
    bounds = Bounds.of(stored.values())
    found, reason = None, "no adapter knows how it is built"
    for name in LIBRARIES:
        try:
            for record in _built_in(name).records(model):
                entry = {"adapter": name, "record": dict(record), "dtype": next(iter(dtypes), "float32")}
                refused = _refusal(entry, bounds)
                if refused is not None and (found is not None or _refusal(entry, bounds, trust=True) is not None):
                    reason = refused
                elif _same_build(model, rebuilt(entry, "meta", bounds=bounds, trust=refused is not None)):
                    if refused is None:
                        return entry, None
                    found, reason = entry, refused
        except Exception as error:  # someone else's package must not break ours
            reason = f"adapter {name!r} failed ({type(error).__name__}: {error})"
            log.info("adapter %r cannot say how a %s is built", name, type(model).__name__, exc_info=True)
    return found, reason


def _refusal(entry: Mapping[str, Any], bounds: Bounds, trust: bool = False) -> str | None:
    """Why a bundle with this record would not build its model, or ``None``."""
    try:
        check_record(entry, bounds, trust=trust)
        if not trust:
            check_version(entry["adapter"])
    except AdapterError as error:
        return str(error)
    return None


def rebuilt(
    said: Mapping[str, Any],
    device: str = "cpu",
    most_modules: int | None = None,
    *,
    bounds: Bounds | None = None,
    trust: bool = False,
) -> nn.Module:
    """The model that :func:`record_of` speaks of, with random weights; global generators stay as they were.

    The record may be anybody's: it is checked as raw JSON before a model library is imported, and while the model is
    built this thread uses no network, unpickles nothing and starts no process. Only the adapters for timm, torchvision
    and transformers that come with this package build.

    Args:
        said: What it returned.
        device: Where; on ``"meta"`` it takes no memory.
        most_modules: Give up beyond so many modules: a record from a file may ask for any number of layers.
        bounds: What the tensors of the model allow; wide limits if ``None``.
        trust: Whether classes are built that are not listed, and with versions that the lists were not tested with.

    Raises:
        AdapterError: The record is refused, or the adapter cannot build that.
    """
    import torch

    check_record(said, bounds or Bounds(), trust=trust)
    name = said["adapter"]
    if not trust:
        check_version(name)
    dtype: torch.dtype = getattr(torch, said["dtype"])
    try:
        with torch.random.fork_rng(devices=[]), torch.device(device), _at_most(most_modules):
            return _built_in(name).rebuild(said["record"]).to(dtype)
    except Exception as error:
        raise AdapterError(
            f"adapter {name!r} could not build the model again ({type(error).__name__}: {error}); {PASS}"
        ) from error


def _built_in(library: str) -> RecordAdapter:
    """This package's own adapter: another package may have registered one of the same name."""
    module = importlib.import_module(f"cocktail_adapters.{library}")
    adapter: RecordAdapter = getattr(module, f"{library.capitalize()}Adapter")()
    return adapter


@contextmanager
def _at_most(count: int | None) -> Iterator[None]:
    """Inside, this thread may put so many modules into others."""
    from torch.nn.modules.module import register_module_module_registration_hook

    mine, made = threading.get_ident(), 0

    def counted(*_: Any) -> None:
        nonlocal made
        made += threading.get_ident() == mine
        if count is not None and made > count:
            raise AdapterError(f"the record asks for more than {count} modules")

    # The hook is one for the whole process: models that other threads build meanwhile call it too.
    handle = register_module_module_registration_hook(counted)
    try:
        yield
    finally:
        handle.remove()


def _same_build(a: nn.Module, b: nn.Module) -> bool:
    def tensors(m: nn.Module) -> list[Any]:
        return [(n, t.shape, t.dtype) for n, t in (*m.named_parameters(), *m.named_buffers())]

    return tensors(a) == tensors(b) and type(a) is type(b) and repr(a) == repr(b)


def suggestions(reference: str, among: Iterable[str] | None = None) -> str:
    """``"; did you mean …?"`` with the names nearest to a reference, or nothing."""
    names = list(among) if among is not None else [r for a in adapters().values() for r in a.references()]
    near = difflib.get_close_matches(reference, names, n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def _as_inputs(inputs: Any) -> Inputs:
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, tuple | list):
        return tuple(inputs), {}
    return (inputs,), {}


def _from_factory(reference: str, pretrained: bool) -> nn.Module:
    from torch import nn

    module_name, _, path = reference.partition(":")
    if not all(part.isidentifier() for part in [*module_name.split("."), *path.split(".")]):
        raise AdapterError(f"{reference!r} names no model{suggestions(reference)}. A model is {FORMS}.")
    with _current_directory_importable():
        try:
            factory: Any = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if error.name is None or not (module_name + ".").startswith(error.name + "."):
                raise AdapterError(f"{reference!r}: importing {module_name} failed: {error}") from error
            raise AdapterError(
                f"{reference!r}: there is no module {error.name!r} here or among the installed packages"
                f"{suggestions(reference)}. A model is {FORMS}."
            ) from error
        except Exception as error:
            raise AdapterError(
                f"{reference!r}: importing {module_name} failed with {type(error).__name__}: {error}"
            ) from error
        for part in path.split("."):
            if not hasattr(factory, part):
                near = difflib.get_close_matches(part, dir(factory), n=3)
                hint = f"; it has {', '.join(near)}" if near else ""
                raise AdapterError(f"{reference!r}: {module_name} has no {part!r}{hint}")
            factory = getattr(factory, part)
        if isinstance(factory, nn.Module):
            return factory
        if not callable(factory):
            raise AdapterError(
                f"{reference!r} is {type(factory).__name__}, neither a model nor a function that makes one"
            )
        try:
            model = factory(pretrained=True) if pretrained else factory()
        except Exception as error:
            call = "pretrained=True" if pretrained else ""
            raise AdapterError(
                f"{reference!r}: calling {path}({call}) failed with {type(error).__name__}: {error}"
            ) from error
    if not isinstance(model, nn.Module):
        raise AdapterError(f"{reference!r}: {path}() gave {type(model).__name__}, not a torch.nn.Module")
    return model


@contextmanager
def _current_directory_importable() -> Iterator[None]:
    """The console script's path begins with its own folder, where users expect theirs, as with ``python -m``."""
    here = os.getcwd()
    if "" in sys.path or here in sys.path:
        yield
        return
    sys.path.insert(0, here)
    try:
        yield
    finally:
        if here in sys.path:
            sys.path.remove(here)
