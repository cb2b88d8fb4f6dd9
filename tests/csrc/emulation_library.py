"""The emulated kernels from Python: their argument structures, element types, and arrays that end where memory ends."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

FLOAT32, BFLOAT16, FLOAT16 = range(3)
INT64, FLOAT, POINTER = ctypes.c_int64, ctypes.c_float, ctypes.c_void_p


def structure(name: str, *fields: tuple[str, Any]) -> type[ctypes.Structure]:
    return type(name, (ctypes.Structure,), {"_fields_": list(fields)})


# The structures of csrc/core/arguments.h, token_objective_arguments.h, policy_gradient.h, token_checks_arguments.h and
# tile_hash_arguments.h.
LogitsShard = structure(
    "LogitsShard",
    ("data", POINTER),
    ("dtype", ctypes.c_int),
    ("columns", INT64),
    ("row_stride", INT64),
    ("first_column", INT64),
    ("num_columns", INT64),
)
RowSelection = structure("RowSelection", ("rows", POINTER), ("mask", POINTER), ("n", INT64))
PartialsArguments = structure(
    "PartialsArguments",
    ("logits", LogitsShard),
    ("selection", RowSelection),
    ("target", POINTER),
    ("topk_ids", POINTER),
    ("topk", INT64),
    ("temperature", FLOAT),
    ("partials", POINTER),
)
MergeArguments = structure(
    "MergeArguments",
    ("partials", POINTER),
    ("shards", INT64),
    ("n", INT64),
    ("topk", INT64),
    ("mask", POINTER),
    *((name, POINTER) for name in ("log_prob", "entropy", "collision", "topk_log_prob", "max", "log_sum")),
)
TileNodesArguments = structure("TileNodesArguments", ("row", PartialsArguments), ("num_tiles", INT64), ("nodes", INT64))
MergeNodesArguments = structure(
    "MergeNodesArguments",
    ("merge", MergeArguments),
    ("shard_tiles", INT64),
    ("nodes", INT64),
    ("temperature", FLOAT),
    ("waiting", POINTER),
)
DivergenceArguments = structure(
    "DivergenceArguments",
    ("policy", LogitsShard),
    ("rollout", LogitsShard),
    ("selection", RowSelection),
    *((name, POINTER) for name in ("max", "log_sum", "rollout_max", "rollout_log_sum")),
    *((name, POINTER) for name in ("known_ids", "known_log_prob", "log_rescale")),
    ("known", INT64),
    ("temperature", FLOAT),
    ("distance", ctypes.c_int),
    ("sums", POINTER),
)
BackwardArguments = structure(
    "BackwardArguments",
    ("logits", LogitsShard),
    ("n", INT64),
    ("mask", POINTER),
    *((name, POINTER) for name in ("target", "max", "log_sum", "log_prob", "entropy", "grad_log_prob", "grad_entropy")),
    ("temperature", FLOAT),
    ("grad_logits", POINTER),
    ("grad_row_stride", INT64),
)
TokenObjectiveArguments = structure(
    "TokenObjectiveArguments",
    *((name, INT64) for name in ("n", "topk", "vocab_size")),
    *((name, POINTER) for name in ("log_mu", "log_pi", "advantage", "entropy", "collision", "target", "mask")),
    *((name, POINTER) for name in ("topk_ids", "topk_log_mu", "topk_log_pi", "given_divergence")),
    *((name, ctypes.c_int) for name in ("divergence", "direction", "trust_region")),
    *((name, FLOAT) for name in ("delta_low", "delta_high", "ratio_cap", "log_clip_low", "log_clip_high")),
    *((name, FLOAT) for name in ("log_dual_clip", "cispo_ratio_min", "cispo_ratio_max")),
    *((name, POINTER) for name in ("coefficient", "weight", "out_divergence", "means", "maxima", "histogram")),
    *((name, POINTER) for name in ("loss", "tokens")),
)
TokenChecksArguments = structure(
    "TokenChecksArguments",
    *((name, INT64) for name in ("n", "topk", "vocab_size")),
    *((name, POINTER) for name in ("target", "advantage", "log_mu", "mask", "topk_ids", "topk_log_mu", "ref_log_prob")),
    ("log_prob_tolerance", FLOAT),
    ("mass_tolerance", ctypes.c_double),
    ("record", POINTER),
)

PolicyGradientArguments = structure(
    "PolicyGradientArguments",
    ("partials", PartialsArguments),
    ("merge", MergeArguments),
    ("objective", TokenObjectiveArguments),
    ("backward", BackwardArguments),
    ("token_weights", POINTER),
    ("scale", FLOAT),
    ("grad_log_prob", POINTER),
)

TilePiece = structure(
    "TilePiece",
    ("data", POINTER),
    *((name, INT64) for name in ("unit_bytes", "row_stride", "present_rows", "present_units", "row_units")),
    *((name, INT64) for name in ("num_words", "first_word", "first_output_tile", "first_task")),
)
TileMatrix = structure(
    "TileMatrix",
    ("data", POINTER),
    *((name, INT64) for name in ("element_bytes", "row_stride", "present_rows", "present_columns", "rows", "columns")),
)
TileHashArguments = structure(
    "TileHashArguments",
    ("pieces", POINTER),
    ("num_pieces", INT64),
    ("num_tasks", INT64),
    ("sums", POINTER),
    ("total_tiles", INT64),
)


TILE_COLUMNS = 128  # csrc/core/tile_tree.h


def count_nodes(first: int, end: int) -> int:
    """Nodes of the tree that make up tiles [first, end): halves of a cut that both ends leave whole."""
    if first >= end:
        return 0
    size = 1 << (end - first).bit_length()
    while first % size or first + size > end:
        size //= 2
    return 1 + count_nodes(first + size, end)


def encode(values: np.ndarray, dtype: int) -> np.ndarray:
    if dtype == FLOAT16:
        return values.astype(np.float16)
    if dtype == FLOAT32:
        return values.astype(np.float32)
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def decode(values: np.ndarray, dtype: int) -> np.ndarray:
    if dtype == BFLOAT16:
        return (values.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return values.astype(np.float64)


def aligned_matrix(values: np.ndarray, offset: int) -> np.ndarray:
    """A copy whose rows all begin ``offset`` elements behind a 16-byte boundary; its end is the end of the allocation."""
    rows, columns = values.shape
    per_boundary = 16 // values.itemsize
    stride = -(-columns // per_boundary) * per_boundary
    needed = offset + (rows - 1) * stride + columns
    flat = np.empty(needed, values.dtype)
    matrix = np.lib.stride_tricks.as_strided(
        flat[offset:], (rows, columns), (stride * values.itemsize, values.itemsize)
    )
    matrix[:] = values
    return matrix


def address(array: np.ndarray | None) -> int | None:
    return None if array is None else array.ctypes.data


def hash_tiles(
    library: ctypes.CDLL,
    tile_hash: Callable[[ctypes.Structure], None],
    shapes: Sequence[Any],
    sources: Sequence[np.ndarray],
    first_tiles: Sequence[int],
    sums: np.ndarray,
) -> None:
    """Add the sums of pieces (``Shape`` of tile_hash_reference.py) to ``sums`` by a kernel of the library."""
    pieces = (TilePiece * max(len(shapes), 1))()
    num_tasks = 0
    for i, (shape, source) in enumerate(zip(shapes, sources, strict=True)):
        stride = source.strides[0] // source.itemsize
        matrix = TileMatrix(address(source), source.itemsize, stride, *source.shape, shape.rows, shape.columns)
        place = map(INT64, (shape.first_word, first_tiles[i], num_tasks))
        library.describe_piece(ctypes.byref(pieces[i]), ctypes.byref(matrix), *place)
        num_tasks += shape.num_tiles
    tile_hash(TileHashArguments(ctypes.addressof(pieces), len(shapes), num_tasks, address(sums), sums.shape[1]))


class Emulated:
    """The launchers; an error they report becomes RuntimeError."""

    def __init__(self, path: str) -> None:
        self.library = library = ctypes.CDLL(path)
        kernels = ("row_partials", "merge_partials", "policy_backward", "shard_divergence", "token_objective")
        for name in (*kernels, "policy_gradient", "tile_nodes", "merge_tile_nodes", "check_tokens", "tile_hash"):
            function = getattr(library, f"emulated_{name}")
            function.restype = ctypes.c_char_p
            setattr(self, name, self._raising(function))
        library.emulated_divergence_segments.restype = INT64
        self._divergence_segments = library.emulated_divergence_segments
        self._policy_gradient_blocks = getattr(library, "emulated_policy_gradient_blocks", None)  # a CPU has none
        if self._policy_gradient_blocks is not None:
            self._policy_gradient_blocks.restype = INT64

    def divergence_segments(self, arguments: ctypes.Structure, multiprocessors: int) -> int:
        return int(self._divergence_segments(ctypes.byref(arguments), multiprocessors))

    def policy_gradient_blocks(self, arguments: ctypes.Structure, multiprocessors: int, cache_bytes: int) -> int | None:
        """None of the kernels for a CPU, which have no blocks."""
        if self._policy_gradient_blocks is None:
            return None
        return int(self._policy_gradient_blocks(ctypes.byref(arguments), multiprocessors, INT64(cache_bytes)))

    @staticmethod
    def _raising(function: Callable[..., bytes | None]) -> Callable[..., None]:
        def call(arguments: ctypes.Structure, *others: int) -> None:
            if error := function(ctypes.byref(arguments), *others):
                raise RuntimeError(error.decode())

        return call
