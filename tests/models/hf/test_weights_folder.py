"""A folder of weights is read in one way or not at all: whatever could be meant in two ways is refused, with the remedy."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_dppo.errors import ConfigError
from megatron_dppo.models.hf.weights import check_hf_weights
from tests.models.tiny_policies import tiny_hf_config, write_tiny_hf_model

HEAD, EMBEDDING, NORM = "lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"


def check(folder: Path, kind: str) -> None:
    check_hf_weights(folder, tiny_hf_config(kind))


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def split(folder: Path, *, listed: Callable[[dict[str, str]], None] = lambda weight_map: None) -> None:
    """Two files and their index, from the single one."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for number, names in enumerate((sorted(tensors)[::2], sorted(tensors)[1::2]), start=1):
        save_file({name: tensors[name] for name in names}, folder / f"{number}.safetensors", metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, f"{number}.safetensors")
    listed(weight_map)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize(
    ("copy", "message"),
    [
        (lambda embedding: embedding.clone(), None),
        (lambda embedding: embedding + 1e-3, "lm_head.weight differs from model.embed_tokens.weight"),
        (lambda embedding: embedding[:200].clone(), "lm_head.weight differs"),
        (lambda embedding: torch.cat([embedding[:-1], embedding[-1:] * 2]), "Set it to false"),
    ],
    ids=["equal", "trained", "of another shape", "in its last row"],
)
def test_a_tied_output_layer_is_stored_again_only_as_an_equal_copy(tmp_path, copy, message):
    """What transformers does with another one (not to tie) contradicts config.json, which we would write out again."""
    write_tiny_hf_model("llama_tied", tmp_path)
    rewrite(tmp_path, lambda tensors: tensors.update({HEAD: copy(tensors[EMBEDDING])}))
    if message is None:
        check(tmp_path, "llama_tied")
        return
    with pytest.raises(ConfigError, match=message):
        check(tmp_path, "llama_tied")


def test_an_untied_output_layer_has_to_be_there(tmp_path):
    write_tiny_hf_model("llama", tmp_path)
    rewrite(tmp_path, lambda tensors: tensors.pop(HEAD))
    with pytest.raises(ConfigError, match=r"missing: lm_head\.weight"):
        check(tmp_path, "llama")


@pytest.mark.parametrize("stray", ["model.safetensors", "model-00003-of-00003.safetensors"])
@pytest.mark.parametrize("indexed", [True, False])
def test_two_checkpoints_in_one_folder_are_refused(tmp_path, stray, indexed):
    write_tiny_hf_model("llama", tmp_path)
    single = (tmp_path / "model.safetensors").read_bytes()
    if indexed:
        split(tmp_path)
    check(tmp_path, "llama")
    (tmp_path / stray).write_bytes(single)
    if not indexed and stray == "model.safetensors":
        check(tmp_path, "llama")
        return
    with pytest.raises(ConfigError, match=f"has {stray} beside .*remove what is not the model"):
        check(tmp_path, "llama")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda listed: listed.update({NORM: "2.safetensors"}), r"model\.norm\.weight, which the index does not name"),
        (lambda listed: listed.pop(NORM), r"model\.norm\.weight, which the index does not name"),
        (lambda listed: listed.update({NORM: "3.safetensors"}), r"lists files that are not there: 3\.safetensors"),
        (lambda listed: listed.clear(), "has no weight_map"),
    ],
    ids=["in another file", "left out", "in a missing file", "of nothing"],
)
def test_an_index_that_does_not_describe_its_files_is_refused(tmp_path, change, message):
    write_tiny_hf_model("llama", tmp_path)
    split(tmp_path, listed=change)
    assert NORM in load_file(tmp_path / "1.safetensors")
    with pytest.raises(ConfigError, match=message):
        check(tmp_path, "llama")


def test_a_file_that_was_cut_off_is_named(tmp_path):
    write_tiny_hf_model("llama", tmp_path)
    split(tmp_path)
    file = tmp_path / "2.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ConfigError, match=r"2\.safetensors is no whole safetensors file"):
        check(tmp_path, "llama")


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_quantised_tensors_are_refused(tmp_path, dtype):
    write_tiny_hf_model("llama", tmp_path)
    rewrite(tmp_path, lambda tensors: tensors.update({NORM: tensors[NORM].to(dtype)}))
    with pytest.raises(ConfigError, match=r"of another kind of number: model\.norm\.weight is (I8|F8_E4M3)"):
        check(tmp_path, "llama")


def test_a_bias_that_the_model_has_not_is_not_dropped(tmp_path):
    write_tiny_hf_model("llama", tmp_path)
    bias = "model.layers.0.self_attn.q_proj.bias"
    rewrite(tmp_path, lambda tensors: tensors.update({bias: torch.zeros(64)}))
    with pytest.raises(ConfigError, match=f"unexpected: {bias}"):
        check(tmp_path, "llama")
