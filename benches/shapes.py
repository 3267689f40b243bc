"""The tensors of real models, and the entries of them that TaLoS selects.

A model is a list of its parameters, named as its library names them (open_clip's visual tower;
transformers' T5 and MiniLM), with the rows that hold selected entries. After four pruning rounds
99 % of the selected entries lie in Q and K, at a density of about .6 there. A test compares the
lists with the libraries' own models.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch

QK_DENSITY = 0.6


@dataclass(frozen=True)
class TensorShape:
    """One parameter: its name, its shape, and the rows [0, query_key_rows) that Q and K take."""

    name: str
    shape: tuple[int, ...]
    query_key_rows: int = 0

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def query_key_numel(self) -> int:
        return self.query_key_rows * prod(self.shape[1:])


@dataclass(frozen=True)
class ModelShape:
    """A model as the list of its parameters."""

    name: str
    tensors: tuple[TensorShape, ...]
    layers: int
    tokens: int
    """Of a sample: patches and the class token, or what an encoder reads."""

    @cached_property
    def numel(self) -> int:
        return sum(tensor.numel for tensor in self.tensors)

    @cached_property
    def touched(self) -> tuple[TensorShape, ...]:
        """Return the tensors with selected entries: Q and K, fused with V or not."""
        return tuple(tensor for tensor in self.tensors if tensor.query_key_rows)

    @cached_property
    def touched_numel(self) -> int:
        """Return the entries of Q and K: the rows of V in a fused weight do not count."""
        return sum(tensor.query_key_numel for tensor in self.touched)

    @cached_property
    def linears(self) -> tuple[tuple[int, int], ...]:
        """Return the shapes [O, I] of the blocks' linear layers, each once."""
        blocks = (".layer.", ".block.", ".resblocks.")
        matrices = (
            (tensor.shape[0], tensor.shape[1])
            for tensor in self.tensors
            if len(tensor.shape) == 2
            and any(block in tensor.name for block in blocks)
            and "relative_attention_bias" not in tensor.name
        )
        return tuple(dict.fromkeys(matrices))

    def masks(self, density: float = QK_DENSITY) -> dict[str, torch.Tensor]:
        """Return masks of `density` of the Q and K rows of each touched tensor; always the same."""
        generator = torch.Generator().manual_seed(0)
        masks = {}
        for tensor in self.touched:
            mask = torch.zeros(tensor.shape, dtype=torch.bool)
            rows = mask[: tensor.query_key_rows]
            rows.copy_(torch.rand(rows.shape, generator=generator) < density)
            masks[tensor.name] = mask
        return masks


def _vision_transformer(
    name: str, width: int, layers: int, patch: int, tokens: int, embedding: int
) -> ModelShape:
    def tensors() -> Iterator[TensorShape]:
        yield TensorShape("class_embedding", (width,))
        yield TensorShape("positional_embedding", (tokens, width))
        yield TensorShape("proj", (width, embedding))
        yield TensorShape("conv1.weight", (width, 3, patch, patch))
        yield from _norm("ln_pre", width)
        for layer in range(layers):
            block = f"transformer.resblocks.{layer}"
            yield from _norm(f"{block}.ln_1", width)
            yield TensorShape(f"{block}.attn.in_proj_weight", (3 * width, width), 2 * width)
            yield TensorShape(f"{block}.attn.in_proj_bias", (3 * width,))
            yield from _linear(f"{block}.attn.out_proj", width, width)
            yield from _norm(f"{block}.ln_2", width)
            yield from _linear(f"{block}.mlp.c_fc", 4 * width, width)
            yield from _linear(f"{block}.mlp.c_proj", width, 4 * width)
        yield from _norm("ln_post", width)

    return ModelShape(name, tuple(tensors()), layers, tokens)


def _t5(
    name: str, width: int, inner: int, layers: int, heads: int, vocabulary: int, tokens: int
) -> ModelShape:
    def attention(block: str, first: bool) -> Iterator[TensorShape]:
        for part in "qkvo":
            selected = width if part in "qk" else 0
            yield TensorShape(f"{block}.{part}.weight", (width, width), selected)
        if first:
            yield TensorShape(f"{block}.relative_attention_bias.weight", (32, heads))

    def stack(side: str) -> Iterator[TensorShape]:
        parts = ["SelfAttention"] if side == "encoder" else ["SelfAttention", "EncDecAttention"]
        for layer in range(layers):
            block = f"{side}.block.{layer}.layer"
            for i, part in enumerate(parts):
                first = layer == 0 and part == "SelfAttention"
                yield from attention(f"{block}.{i}.{part}", first)
                yield TensorShape(f"{block}.{i}.layer_norm.weight", (width,))
            last = len(parts)
            yield TensorShape(f"{block}.{last}.DenseReluDense.wi.weight", (inner, width))
            yield TensorShape(f"{block}.{last}.DenseReluDense.wo.weight", (width, inner))
            yield TensorShape(f"{block}.{last}.layer_norm.weight", (width,))
        yield TensorShape(f"{side}.final_layer_norm.weight", (width,))

    shared = TensorShape("shared.weight", (vocabulary, width))
    return ModelShape(name, (shared, *stack("encoder"), *stack("decoder")), layers, tokens)


def _minilm(
    name: str, width: int, layers: int, positions: int, vocabulary: int, tokens: int
) -> ModelShape:
    def tensors() -> Iterator[TensorShape]:
        yield TensorShape("embeddings.word_embeddings.weight", (vocabulary, width))
        yield TensorShape("embeddings.position_embeddings.weight", (positions, width))
        yield TensorShape("embeddings.token_type_embeddings.weight", (2, width))
        yield from _norm("embeddings.LayerNorm", width)
        for layer in range(layers):
            block = f"encoder.layer.{layer}"
            for part in ("query", "key", "value"):
                selected = 0 if part == "value" else width
                yield from _linear(f"{block}.attention.self.{part}", width, width, selected)
            yield from _linear(f"{block}.attention.output.dense", width, width)
            yield from _norm(f"{block}.attention.output.LayerNorm", width)
            yield from _linear(f"{block}.intermediate.dense", 4 * width, width)
            yield from _linear(f"{block}.output.dense", width, 4 * width)
            yield from _norm(f"{block}.output.LayerNorm", width)

    return ModelShape(name, tuple(tensors()), layers, tokens)


def _norm(name: str, width: int) -> Iterator[TensorShape]:
    yield TensorShape(f"{name}.weight", (width,))
    yield TensorShape(f"{name}.bias", (width,))


def _linear(name: str, rows: int, columns: int, selected: int = 0) -> Iterator[TensorShape]:
    yield TensorShape(f"{name}.weight", (rows, columns), selected)
    yield TensorShape(f"{name}.bias", (rows,))


SHAPES = {
    shape.name: shape
    for shape in (
        _minilm("minilm", 384, layers=6, positions=512, vocabulary=30522, tokens=48),
        _vision_transformer("vit-b-32", 768, layers=12, patch=32, tokens=50, embedding=512),
        _vision_transformer("vit-l-14", 1024, layers=24, patch=14, tokens=257, embedding=768),
        _t5("t5-large", 1024, inner=4096, layers=24, heads=16, vocabulary=32128, tokens=128),
    )
}
