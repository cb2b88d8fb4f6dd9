"""YAML files and ``key.sub=value`` overrides -> ``Config``.

A file may name the files it builds on, relative to itself, under ``defaults:``; later ones win, the file itself wins over
all of them, and overrides win over everything. A key that does not exist is an error that names the nearest one.
"""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megatron_dppo.errors import ConfigError
from megatron_dppo.training.config.overrides import set_option
from megatron_dppo.training.config.schema import Config
from megatron_dppo.training.config.spelling import as_written, option_types, without_none

# Options that exist elsewhere and must not exist here: who sets one is told why.
_TRUNCATION = (
    "truncated sampling changes the support of the rollout policy, and the log-probs that the trust region is measured with"
    " would not be those of the sampled distribution; responses are drawn from the whole softmax"
)
_REFUSED_KEYS = {f"rollout.{key}": _TRUNCATION for key in ("top_p", "top_k", "min_p")}


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a run's configuration. Raises ConfigError, naming file and key."""
    tree = _read_with_defaults(Path(path), seen=())
    for override in overrides:
        set_option(tree, override)
    _refuse_unknown_keys(tree, Config, name="", source=str(path))
    try:
        return cast(Config, OmegaConf.to_object(OmegaConf.merge(_schema(), tree)))
    except (OmegaConfBaseException, ConfigError) as error:
        named = getattr(error, "full_key", None)
        where = f"{path}: {named}: " if named else f"{path}: "
        raise ConfigError(where + _first_line(error)) from error


def save_config(config: Config, path: Path) -> None:
    """Write the fully resolved configuration as YAML; ``load_config`` reads it back unchanged."""
    path.write_text(OmegaConf.to_yaml(OmegaConf.create(dataclasses.asdict(config)), resolve=True), encoding="utf-8")


def _schema() -> DictConfig:
    schema = OmegaConf.structured(Config)
    OmegaConf.set_readonly(schema, False)
    # A frozen dataclass becomes a read-only node; it is frozen again when to_object builds the real class.
    OmegaConf.set_readonly(schema.algorithm.loss, False)
    OmegaConf.set_readonly(schema.parallel, False)
    return cast(DictConfig, schema)


def _read_with_defaults(path: Path, seen: tuple[Path, ...]) -> DictConfig:
    path = path.resolve()
    if path in seen:
        raise ConfigError(f"{path}: `defaults:` leads back to this file")
    if not path.is_file():
        known = sorted(p.name for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        raise ConfigError(f"{path}: no such configuration file" + (f"; there are {', '.join(known)}" if known else ""))
    own = _read_yaml(path)
    bases = own.pop("defaults", None) or []
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ConfigError(f"{path}: `defaults:` must be a list of file names")
    trees = [_read_with_defaults(path.parent / base, (*seen, path)) for base in bases]
    return cast(DictConfig, OmegaConf.merge(*trees, OmegaConf.create(own)))


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        own = OmegaConf.create(text)  # refuses a key that stands twice
        written = yaml.load(text, Loader=yaml.BaseLoader)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not a text in UTF-8: {error}") from error
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from error
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(own, DictConfig) or not isinstance(written, dict | None):
        raise ConfigError(f"{path}: a mapping is expected at the top level")
    try:
        spelt = as_written(OmegaConf.to_container(own, resolve=False), written, Config, name="")
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    return cast(dict[str, Any], spelt)


def _refuse_unknown_keys(tree: Any, hint: Any, name: str, source: str) -> None:
    """Unknown keys of every section, those in lists included. Values are OmegaConf's to check, when it merges."""
    kind = without_none(hint)
    if typing.get_origin(kind) is list and isinstance(tree, ListConfig):
        for index in range(len(tree)):
            _refuse_unknown_keys(tree._get_node(index), typing.get_args(kind)[0], f"{name}[{index}]", source)
    if not dataclasses.is_dataclass(kind):
        return
    options = option_types(kind)
    if not isinstance(tree, DictConfig):
        raise ConfigError(f"{source}: `{name}` is a section; set its keys, e.g. `{name}.{next(iter(options))}`")
    for key in map(str, tree):
        child = f"{name}.{key}" if name else key
        if key not in options:
            raise ConfigError(f"{source}: unknown key `{child}`{_advice(child, key, list(options))}")
        _refuse_unknown_keys(tree._get_node(key), options[key], child, source)


def _advice(name: str, key: str, options: list[str]) -> str:
    if name in _REFUSED_KEYS:
        return f": {_REFUSED_KEYS[name]}"
    near = _nearest_key(name, key, options)
    return f"; did you mean `{near}`?" if near else ""


def _nearest_key(name: str, key: str, options: list[str]) -> str | None:
    here = difflib.get_close_matches(key, options, n=1, cutoff=0.6)
    if here:
        return name.removesuffix(key) + here[0]
    every = _all_keys(OmegaConf.to_container(_schema()))
    same_leaf = [k for k in every if k.rsplit(".", 1)[-1] == key]
    if same_leaf:
        return same_leaf[0]
    far = difflib.get_close_matches(name, every, n=1, cutoff=0.5)
    return far[0] if far else None


def _all_keys(tree: Any, prefix: str = "") -> list[str]:
    if not isinstance(tree, dict):
        return []
    keys: list[str] = []
    for key, value in tree.items():
        keys += [f"{prefix}{key}", *_all_keys(value, f"{prefix}{key}.")]
    return keys


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
