"""Small models with random content, written in the layouts of packages: GGUF and ONNX."""

from pathlib import Path

import gguf
import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper
from transformers import Dinov2Config, Dinov2Model, LlamaConfig, LlamaForCausalLM

LETTERS = "abcdefghijklmnopqrstuvwxyz"
WORDS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *LETTERS, "Ġ", "Ċ", "ab")
HEADS, KEY_HEADS = 4, 2
_GGUF = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_ONNX = {
    "attention.q_proj": "attention.attention.query",
    "attention.k_proj": "attention.attention.key",
    "attention.v_proj": "attention.attention.value",
    "attention.o_proj": "attention.output.dense",
}


def tiny_llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_HEADS,
        max_position_embeddings=128,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
        tie_word_embeddings=True,
        initializer_range=0.3,
        attn_implementation="eager",
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()


def save_gguf(path: Path, model: LlamaForCausalLM, *, quantised: bool, kind: str = "llama") -> Path:
    """Writes a Llama as llama.cpp does: rows of queries and keys in its order, tokenizer inside."""
    config = model.config
    writer = gguf.GGUFWriter(path, kind)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(WORDS)
    writer.add_token_types([3] * 3 + [1] * (len(WORDS) - 3))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    for name, each in model.state_dict().items():
        if name == "lm_head.weight":  # tied
            continue
        own = name
        for theirs, ours in _GGUF.items():
            own = own.replace(theirs, ours)
        own, values = own.replace("model.layers.", "blk."), each.numpy()
        if own.endswith(("attn_q.weight", "attn_k.weight")):
            heads = HEADS if "attn_q" in own else KEY_HEADS
            half = len(values) // heads // 2
            values = values.reshape(heads, 2, half, -1).swapaxes(1, 2).reshape(values.shape)
        if quantised and values.ndim > 1:
            level = gguf.GGMLQuantizationType.Q8_0
            if own != "token_embd.weight":
                level = gguf.GGMLQuantizationType.Q4_1
            writer.add_tensor(own, gguf.quants.quantize(values, level), raw_dtype=level)
        else:
            writer.add_tensor(own, np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tiny_dinov2() -> Dinov2Model:
    config = Dinov2Config(
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        mlp_ratio=2,
        image_size=70,
        patch_size=14,
        use_mask_token=False,
        layerscale_value=0.5,
        initializer_range=0.2,
        attn_implementation="eager",
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Dinov2Model(config).eval()
        with torch.no_grad():
            for param in model.parameters():
                param.add_(0.1 * torch.randn_like(param))
        return model


def save_onnx(path: Path, model: Dinov2Model, *, without: str = "") -> Path:
    """Writes the weights of a backbone as torch's exporter does, and the nodes that name them."""
    state = {name: each.numpy() for name, each in model.state_dict().items() if name != without}
    tensors, nodes = {"decoder.final_conv.weight": np.zeros((1, 2, 1, 1), np.float32)}, []
    positions = state.pop("embeddings.position_embeddings")
    tensors |= {"onnx::Concat_1": positions[:, :1], "onnx::Reshape_2": positions[:, 1:]}
    nodes.append(helper.make_node("Reshape", ["onnx::Reshape_2", "shape"], ["square"]))
    nodes.append(helper.make_node("Concat", ["onnx::Concat_1", "square"], ["positions"], axis=1))
    for name, each in state.items():
        own = f"backbone.{name}"
        for theirs, ours in _ONNX.items():
            own = own.replace(theirs, ours)
        if each.ndim != 2:
            tensors[own] = each
            continue
        weight, bias = f"onnx::MatMul_{len(tensors)}", own.removesuffix("weight") + "bias"
        tensors[weight] = each.T.copy()
        nodes.append(helper.make_node("MatMul", ["x", weight], [f"{own}/MatMul"]))
        nodes.append(helper.make_node("Add", [bias, f"{own}/MatMul"], [f"{own}/Add"]))
    stored = [numpy_helper.from_array(each, name) for name, each in tensors.items()]
    graph = helper.make_graph(nodes, "tiny", [], [], stored)
    onnx.save(helper.make_model(graph), str(path))
    return path
