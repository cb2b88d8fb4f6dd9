"""``key.sub=value`` from the command line, put into the tree of options that the files gave."""

from __future__ import annotations

import dataclasses
import re
import typing
from typing import Any

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megatron_dppo.errors import ConfigError
from megatron_dppo.training.config.spelling import as_written, option_types, text_as_typed, without_none

_KEY = re.compile(r"[^.\[\]\s]+(\[\d+\])*(\.[^.\[\]\s]+(\[\d+\])*)*")
_STEP = re.compile(r"[^.\[\]]+")


def set_option(tree: DictConfig, override: str, root: type) -> None:
    """Set one option, e.g. ``train.steps=5`` or ``tasks.train[0].size=5``, in ``tree``, whose schema is ``root``.

    Mappings are merged into what is there, lists replace it. Whether the key exists is left to the caller.

    Raises:
        ConfigError: no ``key=value``; an entry of a list that is not there; part of an option that has none; not YAML.
    """
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r}: expected key.sub=value")
    if not _KEY.fullmatch(key):
        raise ConfigError(f"override {override!r}: {key!r} is no key; write section.key or section.list[0].key")
    steps = _STEP.findall(key)
    try:
        hint = _type_at(tree, steps, root)
        value = _value(text, hint, key)
        OmegaConf.update(tree, ".".join(steps), value, merge=True)
    except (ConfigError, OmegaConfBaseException, yaml.YAMLError) as error:
        raise ConfigError(f"override {override!r}: {' '.join(str(error).split())}") from error


def _type_at(tree: DictConfig, steps: list[str], root: type) -> Any:
    """The type of the option that ``steps`` lead to; Any for what the schema does not know, or leaves free."""
    hint: Any = root
    node: Any = tree
    for depth, step in enumerate(steps):
        kind, name = without_none(hint), ".".join(steps[:depth])
        if dataclasses.is_dataclass(kind):
            hint = option_types(kind).get(step, Any)
        elif typing.get_origin(kind) is list:
            entries = len(node) if isinstance(node, ListConfig) else 0
            if not step.isdigit() or int(step) >= entries:
                raise ConfigError(
                    f"`{name}` is a list of {entries} entries, none of which is {step!r}: write {name}[0] for the first"
                    f" one, or {name}=[...] for all"
                )
            (hint,) = typing.get_args(kind)
        elif kind is Any or typing.get_origin(kind) is dict:
            hint = Any
        else:
            raise ConfigError(f"`{name}` is one value, without parts such as {step!r}")
        node = _child(node, step)
    return hint


def _child(node: Any, step: str) -> Any:
    if isinstance(node, ListConfig) and step.isdigit():
        return node._get_node(int(step)) if int(step) < len(node) else None
    return node._get_node(step) if isinstance(node, DictConfig) else None


def _value(text: str, hint: Any, key: str) -> Any:
    if without_none(hint) is str:
        return text_as_typed(text, hint)
    read = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]), resolve=False)
    return as_written(typing.cast(dict[str, Any], read)["value"], yaml.load(text, Loader=yaml.BaseLoader), hint, key)
