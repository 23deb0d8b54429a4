"""Configurations: nested keys with defaults, YAML files that inherit, and `KEY VALUE` pairs.

As in Detectron2, a file may name the one that it inherits from as `_BASE_`, and only keys with a default are known.
"""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from .defaults import DEFAULTS

BASE_KEY = "_BASE_"


class ConfigError(ValueError):
    """A configuration that makes no sense; says which key of which file, and what to write."""


class _Loader(yaml.SafeLoader):
    """Numbers are those of YAML 1.2: 2:4 is a word and not 124, 1e-4 is a number."""


_INT, _FLOAT = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in rules if tag not in (_INT, _FLOAT)]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_INT, re.compile(r"[-+]?[0-9]+$"), list("-+0123456789"))
_FLOATS = re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?$")
_Loader.add_implicit_resolver(_FLOAT, _FLOATS, list("-+.0123456789"))


class Config(dict[str, Any]):
    """A tree of settings, read as attributes: ``cfg.SOLVER.MAX_ITER``."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"no setting {name!r}; there are {', '.join(self)}") from None

    def merge_from_file(self, path: str | Path) -> None:
        """Take settings from a YAML file, those of its ``_BASE_`` first.

        Raises:
            ConfigError: The file cannot be read, inherits from itself, or names a setting that there is not.
        """
        for file, settings in reversed(_chain(Path(path))):
            _merge(self, settings, str(file))

    def merge_from_list(self, pairs: Sequence[str]) -> None:
        """Take settings from ``["SOLVER.MAX_ITER", "100", …]``; values are YAML, or words where words are wanted.

        Raises:
            ConfigError: A key without a value, or one that there is not.
        """
        if len(pairs) % 2:
            raise ConfigError(f"settings come in pairs, KEY VALUE; {pairs[-1]!r} has no value")
        for key, text in zip(pairs[::2], pairs[1::2], strict=True):
            value: Any = _yaml(text, f"the value of {key}")
            if isinstance(self._at(key), str) and not isinstance(value, str):
                value = text  # nothing, or a name such as 2017
            for part in reversed(key.split(".")):
                value = {part: value}
            _merge(self, value, "the command line")

    def _at(self, key: str) -> Any:
        """What a setting is now; ``None`` where there is no such setting."""
        found: Any = self
        for part in key.split("."):
            found = found.get(part) if isinstance(found, Mapping) else None
        return found

    def dump(self) -> str:
        """All settings as YAML."""
        return str(yaml.safe_dump(_plain(self), sort_keys=False, default_flow_style=None, width=110))


def get_cfg() -> Config:
    """The defaults."""
    return _config(copy.deepcopy(DEFAULTS))


def _config(tree: Mapping[str, Any]) -> Config:
    return Config({k: _config(v) if isinstance(v, Mapping) else v for k, v in tree.items()})


def _plain(value: Any) -> Any:
    return {k: _plain(v) for k, v in value.items()} if isinstance(value, Mapping) else value


def _yaml(text: str, what: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{what} is no YAML: {error}") from None


def _chain(path: Path) -> list[tuple[Path, Mapping[str, Any]]]:
    """A file and those that it inherits from."""
    files: list[tuple[Path, Mapping[str, Any]]] = []
    while True:
        if path.resolve() in [file.resolve() for file, _ in files]:
            raise ConfigError(f"{files[0][0]} inherits from itself, through {BASE_KEY} of {files[-1][0]}")
        try:
            settings = _yaml(path.read_text(encoding="utf-8"), str(path)) or {}
        except OSError as error:
            by = f", which {files[-1][0]} inherits from," if files else ""
            raise ConfigError(f"the configuration {path}{by} cannot be read: {error.strerror}") from None
        if not isinstance(settings, Mapping):
            raise ConfigError(f"{path} holds a {type(settings).__name__}, not settings by name")
        settings = dict(settings)
        base = settings.pop(BASE_KEY, None)
        files.append((path, settings))
        if base is None:
            return files
        path = path.parent / Path(str(base)).expanduser()


def _merge(config: Config, settings: Mapping[str, Any], source: str, above: str = "") -> None:
    for name, value in settings.items():
        key = f"{above}{name}"
        if name not in config:
            near = difflib.get_close_matches(str(name), config, n=1, cutoff=0.5)
            hint = f"did you mean {above}{near[0]}?" if near else f"there are {', '.join(above + n for n in config)}"
            raise ConfigError(f"{source} sets {key}, which is no setting; {hint}")
        old = config[name]
        if isinstance(old, Config) and name == "REGISTER":  # names of data sets: the user's own
            _check(isinstance(value, Mapping), key, value, "a mapping from a name to a json file and images", source)
            old.update(_config(value))
        elif isinstance(old, Config):
            _check(isinstance(value, Mapping), key, value, f"settings ({', '.join(old)})", source)
            _merge(old, value, source, f"{key}.")
        else:
            config[name] = _converted(old, value, key, source)


def _converted(old: Any, value: Any, key: str, source: str) -> Any:
    if isinstance(old, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(old, list) and isinstance(value, int | float | str):
        value = [value]
    wanted = type(old).__name__
    _check(type(value) is type(old), key, value, f"a {wanted}, as {old!r}", source)
    return value


def _check(holds: bool, key: str, value: Any, wanted: str, source: str) -> None:
    if not holds:
        raise ConfigError(f"{source} sets {key} to {value!r}; it takes {wanted}")
