"""The keys that servers ask for: who has none can neither generate nor, above all, replace the weights."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from megatron_dppo.errors import ConfigError

# What SGLang 0.5.23 lets nobody do without the admin key, where there is one; of what is asked of it here.
_OF_ADMINISTRATORS = frozenset(
    {
        "/abort_request",
        "/begin_weight_update",
        "/continue_generation",
        "/destroy_weights_update_group",
        "/end_weight_update",
        "/flush_cache",
        "/freeze_gc",
        "/init_weights_update_group",
        "/pause_generation",
        "/release_memory_occupation",
        "/resume_memory_occupation",
        "/update_weight_version",
        "/update_weights_from_distributed",
        "/update_weights_from_tensor",
        "/weights_checker",
    }
)


@dataclass(frozen=True)
class ServerKeys:
    """SGLang's ``--api-key`` and ``--admin-api-key``. Neither is ever shown."""

    api: str | None = field(default=None, repr=False)
    admin: str | None = field(default=None, repr=False)

    @classmethod
    def read(cls, api_variable: str | None, admin_variable: str | None) -> ServerKeys:
        """From environment variables of these names. Raises ConfigError for one that is not set."""
        return cls(_read("api_key_variable", api_variable), _read("admin_api_key_variable", admin_variable))

    def headers(self, path: str) -> dict[str, str]:
        """What a request to ``path`` has to carry."""
        key = (self.admin or self.api) if path in _OF_ADMINISTRATORS else self.api
        return {} if key is None else {"Authorization": f"Bearer {key}"}


def _read(option: str, variable: str | None) -> str | None:
    if variable is None:
        return None
    key = os.environ.get(variable)
    if not key:
        raise ConfigError(
            f"SGLangConfig.{option} names the environment variable {variable}, which is not set: put the key into it, on"
            " every rank"
        )
    return key
