"""A key that no section has is refused, with the one that was meant."""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Iterator
from typing import Any

from omegaconf import DictConfig, ListConfig, Node

from megatron_dppo.errors import ConfigError
from megatron_dppo.training.config.spelling import option_types, without_none

# Options that exist elsewhere and must not exist here: who sets one is told why.
_TRUNCATION = (
    "truncated sampling changes the support of the rollout policy, and the log-probs that the trust region is measured with"
    " would not be those of the sampled distribution; responses are drawn from the whole softmax"
)
_REFUSED_KEYS = {
    **{f"rollout.{key}": _TRUNCATION for key in ("top_p", "top_k", "min_p")},
    "model.recompute_activations": "write model.recompute.granularity=full (or none) instead",
}


def refuse_unknown_keys(tree: DictConfig, root: type, source: str) -> None:
    """Raise ConfigError for the first key that the schema ``root`` lacks, in any section, those in lists included.

    Values are OmegaConf's to check, when it merges.
    """
    _refuse(tree, root, "", source, list(_all_keys(root)))


def _refuse(tree: Any, hint: Any, name: str, source: str, every: list[str]) -> None:
    kind = without_none(hint)
    if typing.get_origin(kind) is list and isinstance(tree, ListConfig):
        for index in range(len(tree)):
            _refuse(tree._get_node(index), typing.get_args(kind)[0], f"{name}[{index}]", source, every)
    if not dataclasses.is_dataclass(kind):
        return
    if kind is not hint and isinstance(tree, Node) and tree._is_none():  # a section that need not be there
        return
    options = option_types(kind)
    if not isinstance(tree, DictConfig):
        raise ConfigError(f"{source}: `{name}` is a section; set its keys, e.g. `{name}.{next(iter(options))}`")
    for key in map(str, tree):
        child = f"{name}.{key}" if name else key
        if key not in options:
            raise ConfigError(f"{source}: unknown key `{child}`{_advice(child, key, list(options), every)}")
        _refuse(tree._get_node(key), options[key], child, source, every)


def _advice(name: str, key: str, options: list[str], every: list[str]) -> str:
    if name in _REFUSED_KEYS:
        return f": {_REFUSED_KEYS[name]}"
    near = _nearest_key(name, key, options, every)
    return f"; did you mean `{near}`?" if near else ""


def _nearest_key(name: str, key: str, options: list[str], every: list[str]) -> str | None:
    here = difflib.get_close_matches(key, options, n=1, cutoff=0.6)
    if here:
        return name.removesuffix(key) + here[0]
    same_leaf = [k for k in every if k.rsplit(".", 1)[-1] == key]
    if same_leaf:
        return same_leaf[0]
    far = difflib.get_close_matches(name, every, n=1, cutoff=0.5)
    return far[0] if far else None


def _all_keys(section: Any, prefix: str = "") -> Iterator[str]:
    for key, hint in option_types(section).items():
        yield f"{prefix}{key}"
        if dataclasses.is_dataclass(kind := without_none(hint)):
            yield from _all_keys(kind, f"{prefix}{key}.")
