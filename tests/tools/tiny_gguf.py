"""A GGUF file as llama.cpp's converter writes one, of a random llama with 60,000 parameters: to be read in a second."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, quants
from tokenizers.pre_tokenizers import ByteLevel

HIDDEN, FFN, HEADS, KEY_VALUE_HEADS = 32, 64, 4, 2
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
SPECIAL, CONTROL, NORMAL = ("<unk>", "<s>", "</s>"), 3, 1
_IN_GGUF = {  # the name in a checkpoint, in a layer -> in the file
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def write_tiny_gguf(path: Path, rope_theta: float) -> dict[str, np.ndarray]:
    """Write the file; returns the weights under their names in a checkpoint, as they are when they are read again."""
    tokens = [*SPECIAL, *sorted(ByteLevel.alphabet()), "ab"]
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FFN)
    writer.add_block_count(1)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_VALUE_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(rope_theta)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([CONTROL] * len(SPECIAL) + [NORMAL] * (len(tokens) - len(SPECIAL)))
    writer.add_token_merges(["a b"])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(TEMPLATE)
    weights = _weights(len(tokens))
    for name, values in weights.items():
        _add(writer, name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return {name: _as_read(name, values) for name, values in weights.items()}


def _weights(vocab_size: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    head = HIDDEN // HEADS
    shapes = {
        "self_attn.q_proj": (HIDDEN, HIDDEN),
        "self_attn.k_proj": (KEY_VALUE_HEADS * head, HIDDEN),
        "self_attn.v_proj": (KEY_VALUE_HEADS * head, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN),
        "mlp.gate_proj": (FFN, HIDDEN),
        "mlp.up_proj": (FFN, HIDDEN),
        "mlp.down_proj": (HIDDEN, FFN),
        "input_layernorm": (HIDDEN,),
        "post_attention_layernorm": (HIDDEN,),
    }
    of_layer = {f"model.layers.0.{name}.weight": shape for name, shape in shapes.items()}
    every = {"model.embed_tokens.weight": (vocab_size, HIDDEN), "model.norm.weight": (HIDDEN,), **of_layer}
    return {name: rng.normal(0, 0.05, shape).astype(np.float32) for name, shape in every.items()}


def _add(writer: GGUFWriter, name: str, values: np.ndarray) -> None:
    inner = name.removeprefix("model.layers.0.").removesuffix(".weight")
    in_file = {"model.embed_tokens": "token_embd", "model.norm": "output_norm"}.get(inner) or f"blk.0.{_IN_GGUF[inner]}"
    if heads := {"self_attn.q_proj": HEADS, "self_attn.k_proj": KEY_VALUE_HEADS}.get(inner):
        values = _interleaved(values, heads)
    if _is_quantised(name):
        kind = GGMLQuantizationType.Q4_1
        writer.add_tensor(f"{in_file}.weight", quants.quantize(values, kind), raw_dtype=kind)
    else:
        writer.add_tensor(f"{in_file}.weight", values)


def _is_quantised(name: str) -> bool:
    return "proj" in name


def _as_read(name: str, values: np.ndarray) -> np.ndarray:
    """Rows are quantised by themselves, in whatever order they are."""
    if not _is_quantised(name):
        return values
    kind = GGMLQuantizationType.Q4_1
    return quants.dequantize(quants.quantize(values, kind), kind)


def _interleaved(rows: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp has the two halves of a head's rotary pairs side by side."""
    return rows.reshape(heads, 2, -1, rows.shape[-1]).swapaxes(1, 2).reshape(rows.shape)
