"""The emulated kernel that looks for impossible values, against what was put where."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from emulation_library import TokenChecksArguments, address

K, VOCAB = 3, 50
NOT_FOUND = [-1.0, 0.0, 0.0]
# check (csrc/core/token_checks_arguments.h) -> the field, and what no token may have there
IMPOSSIBLE: dict[str, tuple[str, Any]] = {
    "target": ("target", VOCAB),
    "advantages": ("advantage", math.inf),
    "log_mu": ("log_mu", 0.25),
    "topk_ids": ("topk_ids", -1),
    "topk_log_mu": ("topk_log_mu", math.nan),
    "topk_mass": ("topk_log_mu", 0.0),
    "ref_log_prob": ("ref_log_prob", -math.inf),
}


def token_checks_failures(emulated: Any, n: int) -> Iterator[str]:
    """n tokens, of which some, all or none are looked at, and some of those spoilt."""
    random = np.random.default_rng(3)
    for has_mask in (True, False):
        mask = random.random(n) < 0.6 if has_mask else None
        inside = np.arange(n) if mask is None else mask.nonzero()[0]
        good = {
            "target": random.integers(0, VOCAB, n),
            "advantage": random.normal(0, 1, n).astype(np.float32),
            "log_mu": -random.random(n).astype(np.float32),
            "topk_ids": random.integers(0, VOCAB, (n, K)),
            "topk_log_mu": np.full((n, K), -2.0, np.float32),
            "ref_log_prob": -random.random(n).astype(np.float32),
        }
        for check, (field, value) in [("nothing", ("", 0)), *IMPOSSIBLE.items()]:
            values = {name: array.copy() for name, array in good.items()}
            if mask is not None:
                for name, array in values.items():
                    array[~mask] = -7 if name in ("target", "topk_ids") else np.nan
            if field and len(inside):
                spoilt = np.sort(random.choice(inside, min(4, len(inside)), replace=False))
                column = (slice(None),) if check == "topk_mass" else (slice(1, None),)
                values[field][(spoilt, *(column if values[field].ndim == 2 else ()))] = value
            record = np.full((len(IMPOSSIBLE), 3), 7.0)
            order = ("target", "advantage", "log_mu", "mask", "topk_ids", "topk_log_mu", "ref_log_prob")
            addresses = [address((values | {"mask": mask})[name]) for name in order]
            emulated.check_tokens(
                TokenChecksArguments(n, K, VOCAB, *addresses, 1e-3, 1e-3, address(record)), 1 + n // 200
            )
            expected = dict.fromkeys(IMPOSSIBLE, NOT_FOUND)
            if field and len(inside):
                first = spoilt[0]
                row = [first, {"topk_mass": float(K)}.get(check, value), values["target"][first]]
                expected |= {check: row}
                if check == "topk_log_mu":  # no number adds up with others to one
                    expected |= {"topk_mass": row}
            for name, got in zip(IMPOSSIBLE, record, strict=True):
                if not np.array_equal(got, np.array(expected[name], float), equal_nan=True):
                    yield f"{check} at {n} tokens: the check of {name} says {got}, not {expected[name]}"
