"""YAML files and ``key.sub=value`` overrides -> ``Config``.

A file may name the files it builds on, relative to itself, under ``defaults:``; later ones win, the file itself wins over
all of them, and overrides win over everything. A key that does not exist is an error that names the nearest one.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megatron_dppo.errors import ConfigError
from megatron_dppo.training.config.schema import Config

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
        key, equals, _ = override.partition("=")
        if not equals or not key:
            raise ConfigError(f"override {override!r}: expected key.sub=value")
        try:
            tree = cast(DictConfig, OmegaConf.merge(tree, OmegaConf.from_dotlist([override])))
        except (OmegaConfBaseException, yaml.YAMLError) as error:
            raise ConfigError(f"override {override!r}: {_first_line(error)}") from error
    schema = _schema()
    _refuse_unknown_keys(tree, schema, prefix="", source=str(path))
    try:
        return cast(Config, OmegaConf.to_object(OmegaConf.merge(schema, tree)))
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
    try:
        own = OmegaConf.load(path)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(own, DictConfig):
        raise ConfigError(f"{path}: a mapping is expected at the top level")
    bases = own.pop("defaults", None) or []
    if not isinstance(bases, (list, ListConfig)) or not all(isinstance(base, str) for base in bases):
        raise ConfigError(f"{path}: `defaults:` must be a list of file names")
    trees = [_read_with_defaults(path.parent / base, (*seen, path)) for base in bases]
    return cast(DictConfig, OmegaConf.merge(*trees, own))


def _refuse_unknown_keys(tree: DictConfig, schema: DictConfig, prefix: str, source: str) -> None:
    for key in map(str, tree):
        name = f"{prefix}{key}"
        if key not in schema:
            raise ConfigError(f"{source}: unknown key `{name}`{_advice(name, key, schema, prefix)}")
        child, child_schema = tree._get_node(key), schema._get_node(key)
        if not isinstance(child_schema, DictConfig) or OmegaConf.get_type(child_schema) is dict:
            continue  # a leaf, a list or a free-form mapping: OmegaConf checks its type when merging
        if not isinstance(child, DictConfig):
            raise ConfigError(
                f"{source}: `{name}` is a section; set its keys, e.g. `{name}.{next(map(str, child_schema))}`"
            )
        _refuse_unknown_keys(child, child_schema, f"{name}.", source)


def _advice(name: str, key: str, schema: DictConfig, prefix: str) -> str:
    if name in _REFUSED_KEYS:
        return f": {_REFUSED_KEYS[name]}"
    near = _nearest_key(name, key, schema, prefix)
    return f"; did you mean `{near}`?" if near else ""


def _nearest_key(name: str, key: str, schema: DictConfig, prefix: str) -> str | None:
    here = difflib.get_close_matches(key, [str(k) for k in schema], n=1, cutoff=0.6)
    if here:
        return prefix + here[0]
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
