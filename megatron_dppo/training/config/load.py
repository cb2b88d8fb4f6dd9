"""YAML files and ``key.sub=value`` overrides -> ``Config``.

A file may name the files it builds on, relative to itself, under ``defaults:``; later ones win, the file itself wins over
all of them, and overrides win over everything. ``cluster=slurm`` puts another file of the folder ``cluster`` in the place of
the one that is named there (groups.py). A key that does not exist is an error that names the nearest one.

The section ``launch`` says where a run takes place. Only what starts runs (megatron_dppo/launch) has options for it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megatron_dppo.errors import ConfigError
from megatron_dppo.training.config.groups import Choices, in_place_of, split_choices
from megatron_dppo.training.config.overrides import set_option
from megatron_dppo.training.config.schema import Config
from megatron_dppo.training.config.spelling import as_written, option_types
from megatron_dppo.training.config.unknown_keys import refuse_unknown_keys

_LAUNCH = "launch"
Root = TypeVar("Root", bound=Config)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a run's configuration. Raises ConfigError, naming file and key.

    Args:
        path: of the file.
        overrides: ``key.sub=value``, and choices of files, ``cluster=slurm``.
    """
    return load_as(Config, path, overrides)


def load_as(root: type[Root], path: str | Path, overrides: Sequence[str] = ()) -> Root:
    """``load_config`` for a ``Config`` with further sections."""
    choices, options = split_choices(overrides)
    tree = _read_with_defaults(Path(path), (), root, choices)
    choices.check_all_made(path)
    for override in options:
        set_option(tree, override, root)
    if _LAUNCH not in option_types(root):
        tree.pop(_LAUNCH, None)
    refuse_unknown_keys(tree, root, source=str(path))
    try:
        return cast(Root, OmegaConf.to_object(OmegaConf.merge(_schema(root), tree)))
    except (OmegaConfBaseException, ConfigError) as error:
        named = getattr(error, "full_key", None)
        where = f"{path}: {named}: " if named else f"{path}: "
        raise ConfigError(where + _first_line(error)) from error


def save_config(config: Config, path: Path) -> None:
    """Write the fully resolved configuration as YAML; ``load_config`` reads it back unchanged."""
    path.write_text(OmegaConf.to_yaml(OmegaConf.create(dataclasses.asdict(config)), resolve=True), encoding="utf-8")


def _schema(root: type[Config]) -> DictConfig:
    schema = OmegaConf.structured(root)
    OmegaConf.set_readonly(schema, False)
    # A frozen dataclass becomes a read-only node; it is frozen again when to_object builds the real class.
    OmegaConf.set_readonly(schema.algorithm.loss, False)
    OmegaConf.set_readonly(schema.parallel, False)
    return cast(DictConfig, schema)


def _read_with_defaults(path: Path, seen: tuple[Path, ...], root: type[Config], choices: Choices) -> DictConfig:
    path = path.resolve()
    if path in seen:
        raise ConfigError(f"{path}: `defaults:` leads back to this file")
    if not path.is_file():
        known = sorted(p.name for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        raise ConfigError(f"{path}: no such configuration file" + (f"; there are {', '.join(known)}" if known else ""))
    own = _read_yaml(path, root)
    bases = own.pop("defaults", None) or []
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ConfigError(f"{path}: `defaults:` must be a list of file names")
    files = [in_place_of(path.parent / base, choices) for base in bases]
    trees = [_read_with_defaults(file, (*seen, path), root, choices) for file in files]
    return cast(DictConfig, OmegaConf.merge(*trees, OmegaConf.create(own)))


def _read_yaml(path: Path, root: type[Config]) -> dict[str, Any]:
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
        spelt = as_written(OmegaConf.to_container(own, resolve=False), written, root, name="")
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    return cast(dict[str, Any], spelt)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
