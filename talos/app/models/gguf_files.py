"""Llama models in GGUF files, as llama.cpp writes them: dequantised to float32.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from talos.app.extras import import_package
from talos.app.models.folders import load_tokenizer, whole_model
from talos.app.models.language import LanguageModel, language_model
from talos.errors import TalosValueError

__all__ = ["load_gguf"]

_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_SETTINGS = {
    "hidden_size": "llama.embedding_length",
    "intermediate_size": "llama.feed_forward_length",
    "num_hidden_layers": "llama.block_count",
    "num_attention_heads": "llama.attention.head_count",
    "num_key_value_heads": "llama.attention.head_count_kv",
    "max_position_embeddings": "llama.context_length",
    "rms_norm_eps": "llama.attention.layer_norm_rms_epsilon",
}
_TOKENS = {
    "bos_token_id": "tokenizer.ggml.bos_token_id",
    "eos_token_id": "tokenizer.ggml.eos_token_id",
    "pad_token_id": "tokenizer.ggml.padding_token_id",
}


def load_gguf(path: Path, name: str) -> LanguageModel:
    """Load a Llama of a GGUF file in float32 and evaluation mode; its tokenizer lies in the file.

    Args:
        path: the file.
        name: the source that is loaded.

    Raises:
        TalosRuntimeError: gguf or transformers is not installed.
        TalosValueError: the file is no GGUF file or holds another architecture, or weights are
            missing.
    """
    gguf, transformers = import_package("gguf"), import_package("transformers")
    try:
        reader = gguf.GGUFReader(path)
        about = {key: field.contents() for key, field in reader.fields.items() if _is_setting(key)}
    except Exception as error:  # the reader raises any error over a damaged file
        raise TalosValueError(
            f"source must be a GGUF file, got {path}: {error!s:.200}; install its package again"
        ) from error
    if (found := about.get("general.architecture")) != "llama":
        raise TalosValueError(f"source must hold a Llama, got {found!r} in {path}")
    heads = {
        "q_proj": about["llama.attention.head_count"],
        "k_proj": about["llama.attention.head_count_kv"],
    }
    state = {}
    for each in reader.tensors:
        own, part = _renamed(each.name)
        values = torch.from_numpy(gguf.quants.dequantize(each.data, each.tensor_type).copy())
        state[own] = _halves(values, heads[part]) if part in heads else values
    model = whole_model(
        "LlamaForCausalLM",
        None,
        path,
        config=transformers.LlamaConfig(**_settings(about, state)),
        state_dict=state,
    )
    tokenizer = load_tokenizer(path.parent, gguf_file=path.name)
    return language_model(model, tokenizer, path, name)


def _is_setting(key: str) -> bool:
    return key.startswith(("general.architecture", "llama.")) or key in _TOKENS.values()


def _settings(about: Mapping[str, Any], state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return what a `LlamaConfig` takes."""
    theta = about.get("llama.rope.freq_base", 10_000.0)
    return {
        **{ours: about[theirs] for ours, theirs in _SETTINGS.items()},
        **{ours: about.get(theirs) for ours, theirs in _TOKENS.items()},
        "vocab_size": len(state["model.embed_tokens.weight"]),
        "rope_parameters": {"rope_type": "default", "rope_theta": float(theta)},
        "tie_word_embeddings": "lm_head.weight" not in state,
    }


def _renamed(name: str) -> tuple[str, str]:
    """Return the name that transformers gives a tensor, and the last module in it."""
    *layer, part, kind = name.split(".")
    own = _NAMES.get(part, part)
    prefix = f"model.layers.{layer[1]}." if layer else ""
    return f"{prefix}{own}.{kind}", own.rpartition(".")[2]


def _halves(weight: Tensor, heads: int) -> Tensor:
    """Undo llama.cpp's order of the rows of a head, [half, 2], to that of transformers, [2, half].

    Args:
        weight: [heads * 2 * half, in].
        heads: number of heads.
    """
    return weight.view(heads, -1, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
