"""The CUDA kernels without a GPU: the same .cu files on the host emulation (tests/csrc/emulation), against float64.

Every kernel runs under several schedules, then under AddressSanitizer + UndefinedBehaviourSanitizer and ThreadSanitizer.
That the emulation would notice is tested too: each seeded bug must be caught by the named way of running.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from _pytest.mark import ParameterSet

from tests.csrc.sanitized_driver import asan_environment, library_path, run_driver

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
CUDA_HEADERS = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "include/cuda_runtime_api.h"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ on this machine"),
    pytest.mark.skipif(not CUDA_HEADERS.exists(), reason=f"no CUDA toolkit headers ({CUDA_HEADERS}); set CUDA_HOME"),
    pytest.mark.skipif(not CSRC.exists(), reason="csrc/ is not beside the tests"),
]


def nightly(value: str) -> ParameterSet:
    return pytest.param(value, marks=pytest.mark.nightly)


def compile_emulation(kind: str, csrc: Path, output: Path, objects: Path) -> Path:
    build = Path(__file__).with_name("emulation") / "build.sh"
    command = [str(build), kind, str(output), str(csrc), str(objects)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    return output


def run_library(library: Path, way: str, order: str = "forward") -> tuple[bool, str]:
    """Whether the driver found nothing wrong, and all that was said."""
    variables = {"EMULATION_ORDER": order}
    if way == "asan":
        variables |= asan_environment()
    if way in ("tsan", "interblock"):
        variables |= {"LD_PRELOAD": library_path("libtsan.so"), "TSAN_OPTIONS": "halt_on_error=1 exitcode=66"}
    if way == "interblock":
        return run_driver(library, "--interblock", **variables, EMULATION_INTERBLOCK="1")
    return run_driver(library, **variables)


Said = Callable[..., tuple[bool, str]]


@pytest.fixture(scope="module")
def said(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Said]:
    """``said(**parameters of a test)``: what the driver said. All selected runs start at once: each takes one core."""
    # Where compiled sources are kept: a seeded bug compiles the files that it is in, and no others.
    objects, folder = (tmp_path_factory.mktemp(name) for name in ("emulation_objects", "emulation"))
    selected = [item.callspec.params for item in request.session.items if item.path == request.path]
    ways = {parameters.get("way", "plain") for parameters in selected if "bug" not in parameters}
    libraries = {kind: compile_emulation(kind, CSRC, folder / f"{kind}.so", objects) for kind in {*map(kind_of, ways)}}

    def run(bug: str | None = None, way: str = "plain", order: str = "forward") -> tuple[bool, str]:
        if bug is not None:
            return run_with_a_bug(bug, tmp_path_factory.mktemp("bug"), objects)
        return run_library(libraries[kind_of(way)], way, order)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        runs = [(parameters, pool.submit(run, **parameters)) for parameters in selected]
        yield lambda **parameters: next(future for of, future in runs if of == parameters).result()
        pool.shutdown(cancel_futures=True)


def kind_of(way: str) -> str:
    """How the library is compiled that is run this way."""
    return "tsan" if way == "interblock" else way


@pytest.mark.parametrize("order", ["forward", "random:1", nightly("reverse"), nightly("random:2")])
def test_every_schedule_gives_the_right_numbers(said: Said, order: str) -> None:
    fine, answer = said(order=order)
    assert fine, answer


@pytest.mark.parametrize("way", ["asan", "tsan", "interblock"])
@pytest.mark.parametrize("order", ["forward", nightly("random:3")])
def test_sanitizers_find_nothing(said: Said, way: str, order: str) -> None:
    fine, answer = said(way=way, order=order)
    assert fine, answer


# name: (file, text, replacement, the way of running that must catch it, what it must say)
BUGS = {
    "missing barrier between warps": (
        "cuda/row_reduction.cuh",
        "if (lane == 0) warp_states[warp] = state;\n  __syncthreads();",
        "if (lane == 0) warp_states[warp] = state;",
        "tsan",
        "data race",
    ),
    "missing barrier before the target's column": (
        "cuda/policy_backward.cu",
        "  __syncthreads();  // whoever",
        "  // whoever",
        "tsan",
        "data race",
    ),
    "divergent barrier": (
        "cuda/row_reduction.cuh",
        "  __syncthreads();\n  if (warp != 0) return state;",
        "  if (warp != 0) return state;\n  __syncthreads();",
        "plain",
        "__syncthreads()",
    ),
    "divergent shuffle": (
        "cuda/row_reduction.cuh",
        "  state = warp_merge(state, exp2_scale);\n  if (lane == 0)",
        "  if (lane % 2 == 0) state = warp_merge(state, exp2_scale);\n  if (lane == 0)",
        "plain",
        "deadlock",
    ),
    "shared memory overrun": (
        "cuda/row_reduction.cuh",
        "warp_states[warp] = state",
        "warp_states[warp + 1] = state",
        "asan",
        "heap-buffer-overflow",
    ),
    "read past the end of a row": (
        "cuda/row_reduction.cuh",
        "for (; v < num_vectors;",
        "for (; v <= num_vectors;",
        "asan",
        "heap-buffer-overflow",
    ),
    "misaligned vector": (
        "cuda/vector_access.cuh",
        "return min(past == 0 ? 0 : Vector<T>::kSize - past, n);",
        "return 0 * past * n;",
        "asan",
        "misaligned",
    ),
    "all blocks write one row": (
        "cuda/row_reduction.cuh",
        "float* out = args.partials + i *",
        "float* out = args.partials + 0 * i *",
        "interblock",
        "data race",
    ),
    "blocks' results are merged without a fence": (
        "cuda/last_block.cuh",
        "  __threadfence();  // what",
        "  // what",
        "interblock",
        "data race",
    ),
    "no block is the last": (
        "cuda/last_block.cuh",
        "== blocks - 1",
        "== blocks",
        "plain",
        "is off by",
    ),
    "padding is read": (
        "cuda/row_partials.cu",
        "args.logits.num_columns",
        "args.logits.columns",
        "plain",
        "is off by",
    ),
    "totals are read before all rows are written": (
        "cuda/token_objective.cu",
        "  }\n  __syncthreads();\n\n  for (int bin",
        "  }\n\n  for (int bin",
        "tsan",
        "data race",
    ),
    "the last block adds up its own totals only": (
        "cuda/token_objective.cu",
        "combine_rows(static_cast<int>(gridDim.x),",
        "combine_rows(1,",
        "plain",
        "means is off by",
    ),
    "the gradient begins before the token is decided about": (
        "cuda/policy_gradient.cu",
        "gradients[0] = decide_row(args, i);\n    __syncthreads();",
        "gradients[0] = decide_row(args, i);",
        "tsan",
        "data race",
    ),
    "a block stops after its first row": (
        "cuda/policy_gradient.cu",
        "i += gridDim.x",
        "i += args.partials.selection.n",
        "plain",
        "logits differs from the two passes' in rows",
    ),
    "the statistics of a row that was loaded ahead end too early": (
        "cuda/row_reduction.cuh",
        "for (int step = 0; step < kStepsAhead; ++step) {",
        "for (int step = 0; step < kStepsAhead - (kStepsAhead > 1); ++step) {",
        "plain",
        "log_prob differs from the two passes' in rows",
    ),
    "the top K's log-probabilities are not waited for": (
        "cuda/policy_gradient.cu",
        "write_topk(args.merge, i, k, kTarget, kTopk + args.merge.topk);\n      __syncthreads();",
        "write_topk(args.merge, i, k, kTarget, kTopk + args.merge.topk);",
        "tsan",
        "data race",
    ),
    "a check finds the last bad token instead of the first": (
        "cuda/check_tokens.cu",
        "args.n - i));",
        "i + 1));",
        "plain",
        "the check of target says",
    ),
    "the record is written before all blocks have looked": (
        "cuda/check_tokens.cu",
        "if (!is_last_block(workspace.finished, gridDim.x)) return;",
        "if (blockIdx.x != gridDim.x - 1) return;",
        "interblock",
        "data race",
    ),
    "a masked token is checked": (
        "cuda/check_tokens.cu",
        "if (args.mask.skips(i)) continue;",
        "",
        "plain",
        "the check of advantages says",
    ),
    "a masked row is read": (
        "cuda/row_partials.cu",
        "if (args.selection.skips(i)) {",
        "if (false) {",
        "plain",
        "the partials of a masked row are not 0",
    ),
    "a masked row's divergence is summed": (
        "cuda/shard_divergence.cu",
        "if (args.selection.skips(i)) {",
        "if (false) {",
        "plain",
        "the divergence of a masked row is not 0",
    ),
    "a masked row's gradient is not zeroed": (
        "cuda/policy_backward.cu",
        "  fill_zero(out + valid_end",
        "  if (!g.is_zero) fill_zero(out + valid_end",
        "plain",
        "the gradient of a masked row is not 0",
    ),
    "a masked row's saved values are looked at": (
        "core/row_outputs.h",
        "if (args.mask.skips(i)) {",
        "if (false) {",
        "plain",
        "the gradient of a masked row is not 0",
    ),
    "a masked token enters the totals": (
        "core/token_objective.h",
        "if (args.mask.skips(i)) {",
        "if (false) {",
        "plain",
        "the results of a masked token are not 0",
    ),
    "the largest probability is counted twice": (
        "core/probability.h",
        "others += leads ? largest : p;",
        "others += p;",
        "plain",
        "divergence is off by",
    ),
    "a thread finds only its first known column": (
        "cuda/shard_divergence.cu",
        "if (v == known) known = next_known<kSize>(args, row, column + head, v + kThreads);",
        "if (v == known) known = INT_MAX;",
        "plain",
        "divergence (hybrid=True, kl=False) is off by",
    ),
    "the rollout's row ends later than the policy's": (
        "cuda/shard_divergence.cu",
        "const T* mu = static_cast<const T*>(args.rollout.data) + r",
        "const T* mu = static_cast<const T*>(args.rollout.data) + 8 + r",
        "asan",
        "heap-buffer-overflow",
    ),
    "pieces that share a tile add without atomics": (
        "cuda/tile_hash.cu",
        "atomicAdd(totals, sums.sum);",
        "*totals += sums.sum;",
        "interblock",
        "data race",
    ),
    "zeros that are in no memory are left out": (
        "cuda/tile_hash.cu",
        "column < present_units",
        "column <= present_units",
        "plain",
        "the sums of tiles are wrong",
    ),
    "warps' tiles are merged before all are there": (
        "cuda/tile_nodes.cu",
        "      __syncthreads();\n      RowReduction state;\n      if (parent",
        "      RowReduction state;\n      if (parent",
        "tsan",
        "data race",
    ),
    "tiles far apart are merged first": (
        "cuda/tile_nodes.cu",
        "for (int distance = 1; distance < 32; distance *= 2)",
        "for (int distance = 16; distance > 0; distance /= 2)",
        "plain",
        "has other bits in",
    ),
    "a vector is read beyond the vocabulary": (
        "cuda/tile_nodes.cu",
        "if (n >= kColumns && ",
        "if (n > 0 && ",
        "asan",
        "heap-buffer-overflow",
    ),
    "the smaller maximum is lost in a merge": (
        "core/row_reduction.h",
        "decay_b * b.rest + e,",
        "decay_b * b.rest,",
        "plain",
        "is off by",
    ),
}


# One for every way of running; to compile and run the others takes some ten minutes.
BUGS_OF_EVERY_PUSH = (
    "missing barrier between warps",
    "divergent shuffle",
    "shared memory overrun",
    "all blocks write one row",
)


def run_with_a_bug(bug: str, folder: Path, objects: Path) -> tuple[bool, str]:
    file, text, replacement, way, _ = BUGS[bug]
    csrc = folder / "csrc"
    shutil.copytree(CSRC, csrc)
    source = (csrc / file).read_text()
    assert text in source, f"{file} no longer contains {text!r}: seed this bug anew"
    (csrc / file).write_text(source.replace(text, replacement))
    return run_library(compile_emulation(kind_of(way), csrc, folder / "emulation.so", objects), way)


@pytest.mark.parametrize("bug", [bug if bug in BUGS_OF_EVERY_PUSH else nightly(bug) for bug in BUGS])
def test_a_seeded_bug_is_caught(said: Said, bug: str) -> None:
    fine, answer = said(bug=bug)
    assert not fine
    assert BUGS[bug][-1] in answer, answer
