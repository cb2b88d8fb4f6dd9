"""Loaded by SGLang in every process of a server: ``/weights_checker`` also hashes parts of parameters, when it is asked to.

SGLang keeps q, k and v, or all experts of a layer, in one parameter and has one hash for it: enough to know that something is
wrong, too little to say what. Parts are asked for in ``skip_tensor_list`` (part_hashes of the trainer's side): a server
without this plugin takes that for the name of a tensor that it does not have, and answers with its usual hashes.
"""

import json
from typing import Any

ASKED_BY = "megatron_dppo.parts:"
_EVERYTHING = ""  # is in every name, so nothing else is hashed


def hash_parts(handle: Any, checker: Any, action: str, *args: Any, **options: Any) -> Any:
    """In place of ``WeightChecker.handle``. ``checksums`` becomes {"parameter first_word end_word": hash} of this rank."""
    asked = [entry for entry in options.get("skip_tensor_list") or () if entry.startswith(ASKED_BY)]
    if action != "checksum" or not asked:
        return handle(checker, action, *args, **options)
    from sglang.srt.utils import weight_checker

    answer = handle(checker, action, *args, **{**options, "skip_tensor_list": [_EVERYTHING]})
    tensors = dict(checker._model_state())
    rank = str(checker._placement["tp_rank"])
    answer["checksums"] = {
        f"{parameter} {first} {end}": weight_checker._hash_tensor(words_of(tensors[parameter])[first:end])
        for parameter, by_rank in json.loads(asked[0].removeprefix(ASKED_BY)).items()
        for first, end in by_rank.get(rank, ())
    }
    return answer


def words_of(tensor: Any) -> Any:
    """The tensor, flattened, as words of 4 bytes."""
    import torch

    return tensor.detach().contiguous().reshape(-1).view(torch.int32)


def register() -> None:
    """What SGLang calls."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register("sglang.srt.utils.weight_checker.WeightChecker.handle", hash_parts, HookType.AROUND)
