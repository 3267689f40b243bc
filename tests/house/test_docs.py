"""The pages say what the code does: the tables of docs/models.md are made again and compared."""

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import transformers
from timm import create_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from talos.app.tasks.load import built_in
from talos.errors import TalosValueError
from talos.names import named_parameters
from talos.params import Candidates, select_parameters
from tests.architecture.test_families import FAMILIES, expand, pattern_of

DOCS = Path(__file__).resolve().parents[2] / "docs"
DOCUMENT = (DOCS / "models.md").read_text()
NORMS = ("LayerNorm", "RMSNorm")
HEADS = (
    *("head.", "classifier.", "pre_classifier.", "score.", "lm_head."),
    *("visual_projection.", "text_projection."),
)


def body(title: str) -> str:
    """What stands under a heading, up to the next one."""
    match = re.search(rf"^#+ {re.escape(title)}\n(.*?)(?=^#|\Z)", DOCUMENT, re.M | re.S)
    assert match is not None, f"docs/models.md has no heading {title!r}"
    return match[1]


def section(title: str) -> list[list[str]]:
    """The cells of the table under a heading, without its header."""
    lines = [line for line in body(title).splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def together(names: Iterable[str]) -> str:
    """Names in short: parameters of one module, then modules of one parent, in braces."""

    def braces(parts: list[str]) -> str:
        return parts[0] if len(parts) == 1 else "{" + ",".join(parts) + "}"

    def merge(pairs: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
        merged: dict[str, list[str]] = {}
        for key, part in pairs:
            merged.setdefault(key, []).append(part)
        return merged

    params = merge((name.rpartition(".")[0], name.rpartition(".")[2]) for name in names)
    modules = merge(
        (f"{module.rpartition('.')[0]}|{braces(own)}", module.rpartition(".")[2])
        for module, own in params.items()
    )
    found = []
    for key, leaves in modules.items():
        parent, _, own = key.partition("|")
        found.append(".".join(filter(None, [parent, braces(leaves), own])))
    return ", ".join(f"`{each}`" for each in found)


def kind_of(name: str, users: list[nn.Module]) -> str:
    """What a parameter is, by the modules that hold it and by its name."""
    module, embedding = users[0], any(isinstance(each, nn.Embedding) for each in users)
    if embedding and any(isinstance(each, nn.Linear) for each in users):
        return "embedding, also the head"
    if embedding:
        return "relative position bias" if "relative" in name else "embedding"
    if name.startswith(HEADS):
        return "head"
    if isinstance(module, nn.MultiheadAttention) or ".qkv." in name:
        return "linear, queries, keys and values in one"
    if isinstance(module, Conv1D):
        return "linear, weight [in, out]"
    if isinstance(module, nn.Linear):
        return "linear"
    if ".experts." in name:
        return "linear, stacked experts"
    if "gate." in name or "router." in name:
        return "router"
    if isinstance(module, nn.Conv2d):
        return "patch convolution"
    return "norm" if type(module).__name__.endswith(NORMS) else "bare parameter"


def expected_rows(model: nn.Module) -> list[list[str]]:
    """The table of a model: what, which parameters, "maskable", "qk"."""
    chosen = select_parameters(model)
    try:
        qk, otherwise = select_parameters(model, "qk"), "no"
    except TalosValueError:
        qk, otherwise = Candidates(), "refused"
    modules = dict(model.named_modules())
    users: dict[int, list[nn.Module]] = {}
    for name, param in named_parameters(model, remove_duplicate=False).items():
        users.setdefault(id(param), []).append(modules[name.rpartition(".")[0]])
    rows: dict[tuple[str, str, str], dict[str, None]] = {}
    for name, param in named_parameters(model).items():
        kind = kind_of(name, users[id(param)])
        part = otherwise
        if name in qk:
            thirds = (0, 2 * len(param) // 3)
            part = {None: "all rows", thirds: "the first two thirds of the rows"}[qk[name].rows]
        key = (kind, "yes" if name in chosen else "no", part)
        rows.setdefault(key, {})[pattern_of(name)] = None
    return [[kind, together(names), *flags] for (kind, *flags), names in rows.items()]


def title_of(name: str) -> str:
    """The heading of a family: visual towers of open_clip share one."""
    return re.sub(r"^open_clip ViT-.*", "open_clip visual towers", name)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_table_of_a_family_is_what_the_code_selects(name: str) -> None:
    family = FAMILIES[name]
    assert section(title_of(name)) == expected_rows(family.build(family.attentions[0]))
    attention = " and ".join(f"`{each}`" for each in family.attentions).replace("`own`", "its own")
    assert f"Tested with attention: {attention}." in body(title_of(name))


def test_every_table_is_held_to_the_code() -> None:
    titles = re.findall(r"^### (.*)$", DOCUMENT, re.M)
    assert titles == list(dict.fromkeys(map(title_of, FAMILIES)))


def full_size(name: str, config: str, **sizes: Any) -> Callable[[], nn.Module]:
    """A class of transformers at a published size."""
    return lambda: getattr(transformers, name)(getattr(transformers, config)(**sizes))


def t5(d_model: int, d_ff: int, num_layers: int, num_heads: int) -> Callable[[], nn.Module]:
    sizes = {"d_model": d_model, "d_ff": d_ff, "num_layers": num_layers, "num_heads": num_heads}
    return full_size("T5ForConditionalGeneration", "T5Config", **sizes)


def clip(name: str) -> nn.Module:
    model: nn.Module = open_clip.CLIP(**open_clip.get_model_config(name))
    return model


ROBERTA = {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1}
QWEN = {"vocab_size": 151936, "tie_word_embeddings": True}
QWEN2 = {"hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14}
QWEN2 |= {"num_key_value_heads": 2, "intermediate_size": 4864} | QWEN
QWEN3 = {"hidden_size": 1024, "num_hidden_layers": 28, "num_attention_heads": 16}
QWEN3 |= {"num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 3072} | QWEN
QWEN3_MOE = {"hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 32}
QWEN3_MOE |= {"num_key_value_heads": 4, "head_dim": 128, "moe_intermediate_size": 768}
QWEN3_MOE |= {"num_experts": 128, "vocab_size": 151936}
LLAMA = {"hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32, "head_dim": 64}
LLAMA |= {"num_key_value_heads": 8, "intermediate_size": 8192, "vocab_size": 128256}
LLAMA |= {"tie_word_embeddings": True}

# Published sizes: the family, and the model without memory.
SIZES: dict[str, tuple[str, Callable[[], nn.Module]]] = {
    "CLIP ViT-B/32, visual": ("open_clip ViT-B-32 visual", lambda: clip("ViT-B-32").visual),
    "CLIP ViT-B/16, visual": ("open_clip ViT-B-16 visual", lambda: clip("ViT-B-16").visual),
    "CLIP ViT-L/14, visual": ("open_clip ViT-L-14 visual", lambda: clip("ViT-L-14").visual),
    "CLIP ViT-B/32, whole": ("open_clip CLIP", lambda: clip("ViT-B-32")),
    "ViT-B/16": (
        "ViTForImageClassification",
        full_size("ViTForImageClassification", "ViTConfig", num_labels=1000),
    ),
    "BERT base": (
        "BertForSequenceClassification",
        full_size("BertForSequenceClassification", "BertConfig"),
    ),
    "RoBERTa base": (
        "RobertaForSequenceClassification",
        full_size("RobertaForSequenceClassification", "RobertaConfig", **ROBERTA),
    ),
    "DistilBERT base": (
        "DistilBertForSequenceClassification",
        full_size("DistilBertForSequenceClassification", "DistilBertConfig"),
    ),
    "T5 small": ("T5ForConditionalGeneration v1.0", t5(512, 2048, 6, 8)),
    "T5 base": ("T5ForConditionalGeneration v1.0", t5(768, 3072, 12, 12)),
    "T5 large": ("T5ForConditionalGeneration v1.0", t5(1024, 4096, 24, 16)),
    "GPT-2": ("GPT2LMHeadModel", full_size("GPT2LMHeadModel", "GPT2Config")),
    "Llama 3.2 1B": ("LlamaForCausalLM", full_size("LlamaForCausalLM", "LlamaConfig", **LLAMA)),
    "Qwen2 0.5B": ("Qwen2ForCausalLM", full_size("Qwen2ForCausalLM", "Qwen2Config", **QWEN2)),
    "Qwen3 0.6B": ("Qwen3ForCausalLM", full_size("Qwen3ForCausalLM", "Qwen3Config", **QWEN3)),
    "Mixtral 8x7B": ("MixtralForCausalLM", full_size("MixtralForCausalLM", "MixtralConfig")),
    "Qwen3 30B-A3B": (
        "Qwen3MoeForCausalLM",
        full_size("Qwen3MoeForCausalLM", "Qwen3MoeConfig", **QWEN3_MOE),
    ),
    "gpt-oss 20B": (
        "GptOssForCausalLM",
        full_size("GptOssForCausalLM", "GptOssConfig", num_hidden_layers=24, num_local_experts=32),
    ),
    "timm vit_base_patch16_224": (
        "timm VisionTransformer",
        lambda: create_model("vit_base_patch16_224"),
    ),
}


def millions(count: float) -> str:
    return f"{count / 1e6:.1f} M"


def expected_size(label: str) -> list[str]:
    """A row of the table of sizes.

    Without memory nothing can be selected: names decide, as the small model's selection has them.
    """
    name, build = SIZES[label]
    family = FAMILIES[name]
    small = family.build(family.attentions[0])
    chosen = {pattern_of(each) for each in select_parameters(small)}
    with torch.device("meta"):
        params = named_parameters(build())
    counts = {key: param.numel() for key, param in params.items()}
    assert {pattern_of(key) for key in counts} <= set(map(pattern_of, named_parameters(small)))
    assert {pattern_of(key) for key in counts} >= chosen
    maskable = sum(count for key, count in counts.items() if pattern_of(key) in chosen)
    qk = "refused"
    if family.qk is not None:
        patterns, share = expand(family.qk), 2 / 3 if family.fused else 1
        qk = millions(sum(n * share for key, n in counts.items() if pattern_of(key) in patterns))
    return [label, title_of(name), millions(sum(counts.values())), millions(maskable), qk]


@pytest.mark.parametrize("label", SIZES)
def test_sizes_are_those_of_the_published_models(label: str) -> None:
    assert expected_size(label) in section("Sizes")


def test_every_size_is_held_to_the_code() -> None:
    assert [row[0] for row in section("Sizes")] == list(SIZES)


def test_every_built_in_task_is_named_in_the_page_of_data() -> None:
    page = (DOCS / "data.md").read_text()
    assert not [each for each in built_in() if f"`{each}`" not in page]
    assert "`minilm`" in page


def test_every_measurement_that_a_page_cites_can_be_made_again() -> None:
    pages = [DOCS.parent / "README.md", *sorted(DOCS.glob("*.md"))]
    cited = {
        each
        for page in pages
        for each in re.findall(r"/results/[\w-]+/(\w+\.json)", page.read_text())
    }
    table = (DOCS / "research.md").read_text().partition("made again")[2]
    assert cited
    assert not [each for each in sorted(cited) if f"`{each}`" not in table], (
        "name it in docs/research.md"
    )
