"""The sections of gpu_check, one module each, with a function ``checks(options)``. ``SECTIONS`` has them in their order."""

from __future__ import annotations

# What is most worth knowing comes first: time on such a machine may end.
SECTIONS = {
    "machine": "what is there",
    "calls": "every kernel beside float64, on lengths, alignments and sizes that take its other paths",
    "kernels": "bytes per second of each kernel, beside a copy of as many bytes",
    "loss_call": "one call of the loss: time, launches, waits for the device, captured as a graph",
    "training": "the quick start's policy on one device: its reward must rise",
    "generation": "the embedded engine: tokens per second, and how far its log-probs are from a forward pass",
    "fused_linear": "loss from hidden states: without logits, with them, eager, Liger where it is installed",
    "policy_stats": "log-prob, entropy and gradient: ours, eager, what Megatron-core and Transformer Engine have",
    "fp32_head": "an output layer that leaves fp32 logits, beside one that rounds them",
    "layer_specs": "Transformer Engine's layers beside Megatron-core's: loss and gradients",
    "two_ranks": "two GPUs over NCCL: vocabulary shards, layouts beside one rank, the quick start",
    "unit_tests": "tests/ops and tests/loss on the device",
    "sanitizers": "the calls under compute-sanitizer",
    "counters": "the kernels under Nsight Compute",
}
