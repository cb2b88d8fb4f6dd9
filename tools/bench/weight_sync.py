#!/usr/bin/env python3
"""How long a weight update of a real SGLang server takes beside a plain broadcast of the same bytes, in one process.

    python tools/bench/weight_sync.py --server-python .venv-sglang/bin/python

Prints the medians, what of an update was spent on verifying it, and what tools/plan_sync.py says of it with the rates of this
machine, which are printed as well: none is of an update. The plain broadcast goes through a gloo group with one
other process on this machine, into memory that is there already. Fp32 weights of 135M parameters (SmolLM2's shapes).
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed import TCPStore
from transformers import AutoModelForCausalLM, LlamaConfig

from megatron_dppo.launch.plan.sync_cost import Rates, forecast
from megatron_dppo.rollout.sglang import SGLangConfig, SGLangEngine
from megatron_dppo.rollout.sglang.checksums import ExpectedChecksums
from megatron_dppo.rollout.sglang.tile_hash import Piece, hash_pieces
from megatron_dppo.rollout.sglang.weight_route import flatten
from megatron_dppo.rollout.sglang.weight_sync import WeightSync
from megatron_dppo.rollout.whole_weights import WholeWeights

SMOLLM2 = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
    "eos_token_id": 2,
}


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server-python", required=True, help="interpreter that has SGLang")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--layers", type=int, default=SMOLLM2["num_hidden_layers"])
    parser.add_argument("--bucket-mib", type=int, default=64)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = AutoModelForCausalLM.from_config(LlamaConfig(**SMOLLM2 | {"num_hidden_layers": args.layers}))
        model.save_pretrained(folder)
        tensors = {name: p.detach() for name, p in model.named_parameters()}
        num_bytes = sum(tensor.nbytes for tensor in tensors.values())
        print(f"{num_bytes / 2**20:.0f} MiB in {len(tensors)} tensors, buckets of {args.bucket_mib} MiB", flush=True)
        config = SGLangConfig(python=args.server_python, bucket_bytes=args.bucket_mib * 2**20)
        engine = SGLangEngine(
            config, folder, vocab_size=SMOLLM2["vocab_size"], dtype=torch.float32, log_folder=Path(folder) / "logs"
        )
        with closing(engine), _other_process(num_bytes) as broadcast:
            _report(engine, tensors, broadcast, args.rounds)


def _report(
    engine: SGLangEngine, tensors: dict[str, torch.Tensor], broadcast: Callable[..., None], rounds: int
) -> None:
    updates, plain, verifying = [], [], []
    conclude = WeightSync._conclude

    def timed(*arguments: Any) -> Any:
        began = time.perf_counter()
        mismatch = conclude(*arguments)
        verifying.append(time.perf_counter() - began)
        return mismatch

    WeightSync._conclude = timed  # type: ignore[method-assign]
    for version in range(1, rounds + 2):
        began = time.perf_counter()
        engine.update_weights(WholeWeights(tensors), version)
        updates.append(time.perf_counter() - began)
        began = time.perf_counter()
        broadcast()
        plain.append(time.perf_counter() - began)
    update, alone, verify = (statistics.median(seconds[1:]) for seconds in (updates, plain, verifying))
    expected = _forecast(engine, tensors, broadcast)
    print(
        "| update | plain broadcast | ratio | verification, label, continue | of the update | planned | planned / update |"
    )
    print("|---|---|---|---|---|---|---|")
    print(
        f"| {update:.3f} s | {alone:.3f} s | {update / alone:.2f} | {verify:.3f} s | {verify / update:.1%} |"
        f" {expected:.3f} s | {expected / update:.2f} |"
    )


def _forecast(engine: SGLangEngine, tensors: dict[str, torch.Tensor], broadcast: Callable[..., None]) -> float:
    """What tools/plan_sync.py makes of rates that are measured here, none of them in an update."""
    config = engine._config
    num_bytes = sum(tensor.nbytes for tensor in tensors.values())
    buckets = WholeWeights(tensors).buckets(dtype=torch.float32, bucket_bytes=config.bucket_bytes, max_senders=1)
    layout, shape = engine._sync._servers[0].layout, engine._sync._shape
    whole = ExpectedChecksums([t for b in buckets for t in b.tensors], shape, layout, torch.float32)
    named = [[(name, tensors[name]) for name, _ in bucket.tensors] for bucket in buckets]
    # As in an update: memory of a bucket is filled again and again.
    buffer, served = torch.empty(2, max(sum(t.nbytes for _, t in bucket) for bucket in named), dtype=torch.uint8)

    def put_together() -> None:
        for bucket in named:
            flatten([tensor for _, tensor in bucket], buffer)

    def hash_all() -> None:
        for bucket in named:
            hash_pieces({key: value for item in bucket for key, value in _pieces(whole, item).items()})

    def broadcast_beside_the_rest() -> None:
        """On a machine with few cores a sender's threads take them from each other."""
        with ThreadPoolExecutor(1) as pool:
            rest = pool.submit(lambda: (put_together(), hash_all()))
            broadcast(config.bucket_bytes)
        rest.result()

    # Buckets of next to nothing: one of one tensor, one of many.
    small = {name: tensor for name, tensor in tensors.items() if tensor.dim() == 1}
    call_s = _seconds_of_a_bucket(engine, dict([next(iter(small.items()))]))
    tensor_s = max(0.0, _seconds_of_a_bucket(engine, small) - call_s) / (len(small) - 1)
    copy_s, hash_s = _seconds(put_together), _seconds(hash_all)
    rates = Rates(
        network=num_bytes / _seconds(broadcast_beside_the_rest),
        copy=num_bytes / copy_s,
        hash=num_bytes / hash_s,
        call=call_s,
        load=served.nbytes / _seconds(lambda: served.copy_(buffer)),
        tensor=tensor_s,
        checksum=num_bytes / hash_s,
    )
    print("rates: " + ", ".join(f"{name} {value:.3g}" for name, value in vars(rates).items()))
    return forecast(buckets, [(0, 0)] * len(buckets), 4, 1, rates).total


def _seconds_of_a_bucket(engine: SGLangEngine, tensors: dict[str, torch.Tensor]) -> float:
    """The median time in which a server is told of a bucket of these, gets it and says so."""
    sync, weights, measured = engine._sync, WholeWeights(tensors), []
    load = sync._route.load

    async def timed(*bucket: Any) -> None:
        began = time.perf_counter()
        await load(*bucket)
        measured.append(time.perf_counter() - began)

    sync._route.load = timed
    for _ in range(9):
        sync._watch.start(60.0)
        sync._meeting.begin_update()
        sync._send(weights, weights.buckets(dtype=torch.float32, bucket_bytes=2**20, max_senders=1), [])
    sync._route.load = load
    return statistics.median(measured)


def _pieces(expected: ExpectedChecksums, item: tuple[str, torch.Tensor]) -> dict[object, tuple[int, list[Piece]]]:
    return {(item[0], held): (words, [piece]) for held, (words, piece) in expected.pieces(*item).items()}


def _seconds(action: Callable[[], object]) -> float:
    """The median of some."""
    measured = []
    for _ in range(7):
        began = time.perf_counter()
        action()
        measured.append(time.perf_counter() - began)
    return statistics.median(measured)


@contextmanager
def _other_process(num_bytes: int) -> Iterator[Callable[..., None]]:
    """Within: a function that broadcasts so many bytes, or parts of them one by one, to a process that waits for them."""
    store = TCPStore("127.0.0.1", 0, 2, is_master=True, wait_for_workers=False)
    process = mp.get_context("spawn").Process(target=_receive, args=(store.port, num_bytes), daemon=True)
    process.start()
    group = _group(store, 0)
    payload = torch.ones(num_bytes, dtype=torch.uint8)

    def broadcast(bytes_of_a_part: int = num_bytes) -> None:
        group.broadcast(torch.tensor([bytes_of_a_part]), 0).wait()
        for part in payload.split(bytes_of_a_part):
            group.broadcast(part, 0).wait()
        group.barrier().wait()  # it has arrived

    yield broadcast
    group.broadcast(torch.tensor([0]), 0).wait()
    process.join(timeout=30)


def _receive(port: int, num_bytes: int) -> None:
    group = _group(TCPStore("127.0.0.1", port, 2, is_master=False), 1)
    payload, bytes_of_a_part = torch.empty(num_bytes, dtype=torch.uint8), torch.tensor([0])
    while True:
        group.broadcast(bytes_of_a_part, 0).wait()
        if not bytes_of_a_part.item():
            return
        for part in payload.split(int(bytes_of_a_part)):
            group.broadcast(part, 0).wait()
        group.barrier().wait()


def _group(store: TCPStore, rank: int) -> dist.ProcessGroup:
    return dist.ProcessGroupGloo(store, rank, 2, timedelta(seconds=300))


if __name__ == "__main__":
    main()
