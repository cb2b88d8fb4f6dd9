"""What machines are taken to do: data sheets, and the shares of them that programs get. The only place with such numbers.

Every field of ``Assumptions`` can be given on the command line (``--assume name=value``) and is printed with the plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from megatron_dppo.errors import ConfigError
from megatron_dppo.training.metrics.peak_flops import peak_of


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU, by its data sheet.

    Attributes:
        memory: bytes.
        hbm: bytes/s of its memory.
        nvlink: bytes/s to the GPUs of its node, in one direction.
        source: where the numbers are from.
        peak: bf16 operations/s without sparsity, from training/metrics/peak_flops.py.
    """

    memory: float
    hbm: float
    nvlink: float
    source: str
    peak: float


def _gpu(name: str, memory: float, hbm: float, nvlink: float, source: str) -> Gpu:
    peak = peak_of(name)
    assert peak is not None
    return Gpu(memory, hbm, nvlink, source, peak)


GPUS = {
    "h100": _gpu(
        "H100", 80e9, 3.35e12, 450e9, "NVIDIA H100 data sheet, SXM5: 80 GB, 3.35 TB/s, NVLink 900 GB/s both ways"
    ),
    "h200": _gpu(
        "H200", 141e9, 4.8e12, 450e9, "NVIDIA H200 data sheet, SXM: 141 GB, 4.8 TB/s, NVLink 900 GB/s both ways"
    ),
    "h20": _gpu("H20", 96e9, 4.0e12, 450e9, "NVIDIA H20 data sheet: 96 GB, 4.0 TB/s, NVLink 900 GB/s both ways"),
    "a100": _gpu(
        "A100", 80e9, 2.04e12, 300e9, "NVIDIA A100 80 GB SXM data sheet: 2.04 TB/s, NVLink 600 GB/s both ways"
    ),
    "b200": _gpu("B200", 180e9, 8.0e12, 900e9, "NVIDIA DGX B200 data sheet: 180 GB, 8 TB/s, NVLink 1.8 TB/s both ways"),
}


@dataclass(frozen=True)
class Assumptions:
    """What is taken for granted. Shares are of what the data sheet says.

    Attributes:
        memory_reserve: bytes of a GPU that no plan may use: CUDA's context, libraries, graphs.
        group_bytes: of a rank's buffers for each process group over NCCL: 32 channels of 4 MiB (NCCL_BUFFSIZE's default).
        fragmentation: bytes that the allocator holds beyond what is in use, as a share.
        expert_load: tokens that the experts of the rank with the most get, over the mean.
        network: bytes/s of each GPU to other nodes: 400 Gb/s, less a tenth.
        pcie: bytes/s between a GPU and pinned host memory.
        host_memory: bytes/s that the CPU reads and writes for one rank, of optimizer state that is offloaded: an eighth of a
            host of two sockets with 320 GB/s.
        host_network: bytes/s of a rank's values over gloo (samples on their way to who learns from them).
        matmul_share: of the peak, in products of matrices.
        attention_share: of the peak, in attention.
        hbm_share: of memory bandwidth, in everything else.
        link_share: of NVLink's and the network's bandwidth, in collectives.
        latency: seconds for each collective.
        decode_share: of memory bandwidth and peak, in the servers' decoding.
        decode_overhead: seconds of each decoding step, beside what a GPU computes.
        server_fraction: of a GPU's memory for weights and KV cache; if the recipe has no --mem-fraction-static.
        score_s: seconds to score one response in one process.
        prompt_tokens: of every prompt.
        response_median: tokens; 0: a quarter of rollout.max_response_tokens.
        response_sigma: of the logarithm of the lengths, among responses to a prompt.
        prompt_sigma: of the logarithm of the lengths, among prompts.
    """

    memory_reserve: float = 1.5e9
    group_bytes: float = 32 * 4 * 2**20
    fragmentation: float = 0.05
    expert_load: float = 1.2
    network: float = 45e9
    pcie: float = 50e9
    host_memory: float = 40e9
    host_network: float = 2e9
    matmul_share: float = 0.6
    attention_share: float = 0.45
    hbm_share: float = 0.8
    link_share: float = 0.75
    latency: float = 15e-6
    decode_share: float = 0.6
    decode_overhead: float = 2e-3
    server_fraction: float = 0.85
    score_s: float = 0.02
    prompt_tokens: int = 150
    response_median: float = 0.0
    response_sigma: float = 0.6
    prompt_sigma: float = 0.4


def assumptions_from(settings: Sequence[str]) -> Assumptions:
    """``name=value`` each. Raises ConfigError for a name that there is not, or a value that is no number of that kind."""
    kinds: dict[str, type[int] | type[float]] = {name: type(value) for name, value in asdict(Assumptions()).items()}
    changes: dict[str, Any] = {}
    for setting in settings:
        name, _, value = setting.partition("=")
        if name not in kinds:
            raise ConfigError(f"--assume {setting}: there is no {name!r}; there are {', '.join(kinds)}")
        try:
            number = kinds[name](value)
        except ValueError as error:
            raise ConfigError(f"--assume {setting}: {name} is a number") from error
        if not 0 <= number < float("inf") or (
            number == 0 and name.endswith(("share", "network", "pcie", "memory", "load"))
        ):
            raise ConfigError(f"--assume {setting}: {name} must be above 0 and finite")
        changes[name] = number
    return replace(Assumptions(), **changes)
