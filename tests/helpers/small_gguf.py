"""Write a random Llama as a GGUF file, as llama.cpp lays it out, in any of its types."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

WORDS = ["a", "b", "c", "d", "e", "f", "g", "h", "Ġ", "ab", "cd", "Ġa", "Ġb"]
MERGES = ["a b", "c d", "Ġ a", "Ġ b"]
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}"
)


def small_llama(*, seed: int = 0) -> Any:
    """A Llama of two layers, tied, whose key and value heads are fewer than its query heads."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=96,
            vocab_size=len(SPECIALS) + len(WORDS),
            max_position_embeddings=64,
            rms_norm_eps=1e-5,
            initializer_range=0.2,
            tie_word_embeddings=True,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=2,
        )
    ).eval()


def write_gguf(
    model: Any, file: Path, *, kind: str = "F32", without: str = "", architecture: str = "llama"
) -> Path:
    """Write a Llama.

    Args:
        model: A `LlamaForCausalLM`.
        file: Its place.
        kind: Type of the linear weights: F32, Q8_0, Q4_1.
        without: The end of a tensor's name that is left out.
        architecture: As the file names it.
    """
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_name("small")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*SPECIALS, *WORDS])
    writer.add_token_types([3] * len(SPECIALS) + [1] * len(WORDS))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    for name, tensor in tensors_of(model).items():
        if without and name.endswith(without):
            continue
        values = tensor.astype(np.float32)
        if values.ndim == 1 or kind == "F32":
            writer.add_tensor(name, values)
        else:
            of = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(name, gguf.quants.quantize(values, of), raw_dtype=of)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def tensors_of(model: Any) -> dict[str, np.ndarray]:
    """Return a Llama's tensors by llama.cpp's names, queries and keys in its order of rows."""
    config = model.config
    heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads}
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    found = {
        "token_embd.weight": state["model.embed_tokens.weight"],
        "output_norm.weight": state["model.norm.weight"],
    }
    for layer in range(config.num_hidden_layers):
        of = f"model.layers.{layer}"
        for short in ("q", "k", "v"):
            weight = state[f"{of}.self_attn.{short}_proj.weight"]
            if short in heads:
                rows = weight.reshape(heads[short], 2, -1, weight.shape[1])
                weight = rows.swapaxes(1, 2).reshape(weight.shape)
            found[f"blk.{layer}.attn_{short}.weight"] = weight
        for theirs, ours in (
            ("attn_output", "self_attn.o_proj"),
            ("ffn_gate", "mlp.gate_proj"),
            ("ffn_up", "mlp.up_proj"),
            ("ffn_down", "mlp.down_proj"),
            ("attn_norm", "input_layernorm"),
            ("ffn_norm", "post_attention_layernorm"),
        ):
            found[f"blk.{layer}.{theirs}.weight"] = state[f"{of}.{ours}.weight"]
    return found
