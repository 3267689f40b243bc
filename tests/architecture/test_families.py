"""Model families, each as its library's own class: small, with random weights.

Every score is compared with a loop that shares no code with `talos`: one sample at a time, a deep
copy in float64, `torch.autograd.grad`. tests/house/test_docs.py compares what "maskable" selects
with the tables of docs/models.md.
"""

import copy
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
import transformers
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from talos import Mask, fisher_diag
from talos.errors import TalosValueError
from talos.names import named_parameters
from talos.params import select_parameters

N, C, T = 5, 3, 6  # samples, classes, tokens
WIDTH, VOCABULARY, FEATURES = 32, 40, 24
Batch = dict[str, Tensor]
Scores = dict[str, Tensor]


class ZeroShot(nn.Module):
    """A visual tower under a frozen head: the unit features of `C` classes."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.library = tower
        classes = nn.functional.normalize(torch.randn(C, FEATURES), dim=1)
        self.register_buffer("classes", classes)

    def forward(self, pixel_values: Tensor) -> Tensor:
        output = self.library(pixel_values)
        features = getattr(output, "image_embeds", output)
        return 10 * nn.functional.normalize(features, dim=1) @ self.classes.T


class Contrast(nn.Module):
    """A whole CLIP: each image beside `C` texts of its own, so that both towers are scored."""

    def __init__(self, clip: nn.Module) -> None:
        super().__init__()
        self.library = clip

    def forward(self, pixel_values: Tensor, input_ids: Tensor) -> Tensor:
        clip, texts = self.library, input_ids.flatten(0, 1)
        if isinstance(clip, open_clip.CLIP):
            images, texts = clip.encode_image(pixel_values), clip.encode_text(texts)
        else:
            images = clip.get_image_features(pixel_values).pooler_output
            texts = clip.get_text_features(texts).pooler_output
        images, texts = (nn.functional.normalize(each, dim=1) for each in (images, texts))
        return 10 * torch.einsum("bf,bcf->bc", images, texts.unflatten(0, (-1, C)))


def images(count: int, size: int) -> Batch:
    return {"pixel_values": torch.randn(count, 3, size, size)}


def tokens(*lead: int) -> Tensor:
    """Token ids; the highest, by which a CLIP knows the end of a text, comes last."""
    ids = torch.randint(3, VOCABULARY - 1, (*lead, T))
    ids[..., -1] = VOCABULARY - 1
    return ids


def padded(count: int) -> Batch:
    """Texts of unequal lengths: RoBERTa's padding is 1, which is nobody else's token either."""
    lengths = T - torch.arange(count) % 5
    attention_mask = (torch.arange(T) < lengths[:, None]).long()
    input_ids = tokens(count).where(attention_mask > 0, 1)
    return {"input_ids": input_ids, "attention_mask": attention_mask}


def visual(name: str) -> nn.Module:
    return contrastive(name).visual


def contrastive(name: str) -> nn.Module:
    """open_clip's own configuration with fewer, narrower layers and images of 2 x 2 patches."""
    config = open_clip.get_model_config(name)
    size = 2 * config["vision_cfg"]["patch_size"]
    config["vision_cfg"] |= {"width": WIDTH, "layers": 2, "image_size": size, "head_width": 16}
    config["text_cfg"] |= {"width": WIDTH, "layers": 2, "heads": 2}
    config["text_cfg"] |= {"vocab_size": VOCABULARY, "context_length": T}
    return open_clip.CLIP(**config | {"embed_dim": FEATURES})


def timm_vit(attention: str, **options: Any) -> nn.Module:
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": WIDTH, "depth": 2, "num_heads": 2}
    model = VisionTransformer(**sizes, num_classes=C, **options)
    for block in model.blocks:
        block.attn.fused_attn = attention == "sdpa"
    return model


LAYERS = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 40}
VISION = LAYERS | {"hidden_size": WIDTH, "image_size": 16, "patch_size": 8}
TEXT = LAYERS | {"hidden_size": WIDTH, "vocab_size": VOCABULARY, "max_position_embeddings": 16}
CLIP_TEXT = TEXT | {"bos_token_id": 0, "eos_token_id": VOCABULARY - 1}
GROUPED = TEXT | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
EXPERTS = GROUPED | {"num_experts_per_tok": 2}
DISTILLED = {"dim": WIDTH, "n_layers": 2, "n_heads": 2, "hidden_dim": 40, "vocab_size": VOCABULARY}
GPT2 = {"n_embd": WIDTH, "n_layer": 2, "n_head": 2, "n_positions": 16, "vocab_size": VOCABULARY}
GPT2 |= {"bos_token_id": 0, "eos_token_id": 0}
T5 = {"d_model": WIDTH, "d_kv": 16, "d_ff": 40, "num_layers": 2, "num_heads": 2}
T5 |= {"vocab_size": VOCABULARY, "decoder_start_token_id": 0, "relative_attention_num_buckets": 8}


def of_transformers(name: str, config: Any, **options: Any) -> Callable[[str], nn.Module]:
    """A class of transformers by its name, for an implementation of attention."""

    def build(attention: str) -> nn.Module:
        model: nn.Module = getattr(transformers, name)._from_config(
            copy.deepcopy(config), attn_implementation=attention, **options
        )
        return model

    return build


def t5_of_a_checkpoint(attention: str) -> nn.Module:
    """T5 v1.1, whose checkpoints bring a head of their own; without one transformers ties it."""
    config = transformers.T5Config(**T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    model = of_transformers("T5ForConditionalGeneration", config)(attention)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    return model


def seq2seq(count: int) -> Batch:
    """Padded texts and label sequences of unequal lengths."""
    labels = tokens(count)[:, :4].contiguous()
    labels[1::2, 3] = -100
    return padded(count) | {"labels": labels}


@dataclass(frozen=True)
class Family:
    """A family: how to build it, and what is expected of it.

    Names are patterns: `*` stands for numbers between dots, `{a,b}` for either.

    Attributes:
        build: the library's model, from an implementation of attention.
        batch: as many samples as asked for, as the keywords of `forward`.
        qk: what "qk" takes of it; None where it is refused.
        fused: whether "qk" takes the first two thirds of the rows.
        shifts: what the logits do not depend on: softmax does not see what all keys share.
        wrap: the model that is scored, with the library's inside.
        attentions: the implementations of attention.
    """

    build: Callable[[str], nn.Module]
    batch: Callable[[int], Batch]
    qk: tuple[str, ...] | None
    fused: bool = False
    shifts: tuple[str, ...] = ()
    wrap: Callable[[nn.Module], nn.Module] = lambda model: model
    attentions: tuple[str, ...] = ("eager", "sdpa")

    def model(self, attention: str) -> nn.Module:
        """The model that is scored; no weight is zero or the same as its neighbours."""
        model = self.wrap(self.build(attention)).eval()
        with torch.no_grad():
            for name, param in model.named_parameters():
                if param.dim() > 1:
                    rows = param.shape[:2].numel() if "experts" in name else len(param)
                    param.normal_(std=(rows / param.numel()) ** 0.5)
                else:
                    param.add_(0.1 * torch.randn_like(param))
        return model


def names(pattern: str) -> Iterator[str]:
    """The patterns that one with `{a,b}` stands for."""
    match = re.search(r"\{([^}]*)\}", pattern)
    if match is None:
        yield pattern
        return
    for choice in match[1].split(","):
        yield from names(pattern[: match.start()] + choice + pattern[match.end() :])


def pattern_of(name: str) -> str:
    """The pattern of a parameter: its name without numbers, inside of what wraps its model."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name.removeprefix("library."))


def expand(patterns: tuple[str, ...]) -> set[str]:
    return {name for pattern in patterns for name in names(pattern)}


IN_PROJ = "transformer.resblocks.*.attn.in_proj_{weight,bias}"
CLIP_QK = "_model.encoder.layers.*.self_attn.{q_proj,k_proj}.{weight,bias}"
CLIP_SHIFT = "_model.encoder.layers.*.self_attn.k_proj.bias"
BERT_QK = "encoder.layer.*.attention.self.{query,key}.{weight,bias}"
BERT_SHIFT = "encoder.layer.*.attention.self.key.bias"
T5_QK = (
    "{encoder,decoder}.block.*.layer.*.SelfAttention.{q,k}.weight",
    "decoder.block.*.layer.*.EncDecAttention.{q,k}.weight",
)
LLAMA_QK = "model.layers.*.self_attn.{q_proj,k_proj}.weight"

FAMILIES = {
    **{
        f"open_clip {name} visual": Family(
            build=lambda _, name=name: visual(name),
            batch=lambda count, size=size: images(count, size),
            qk=(IN_PROJ,),
            fused=True,
            wrap=ZeroShot,
            attentions=("own",),
        )
        for name, size in (
            *(("ViT-B-32", 64), ("ViT-B-16", 32), ("ViT-L-14", 28)),
            ("ViT-B-32-quickgelu", 64),
        )
    },
    "open_clip CLIP": Family(
        build=lambda _: contrastive("ViT-B-16"),
        batch=lambda count: images(count, 32) | {"input_ids": tokens(count, C)},
        qk=(IN_PROJ, f"visual.{IN_PROJ}"),
        fused=True,
        wrap=Contrast,
        attentions=("own",),
    ),
    "CLIPVisionModelWithProjection": Family(
        build=of_transformers(
            "CLIPVisionModelWithProjection",
            transformers.CLIPVisionConfig(**VISION, projection_dim=FEATURES),
        ),
        batch=lambda count: images(count, 16),
        qk=(f"vision{CLIP_QK}",),
        shifts=(f"vision{CLIP_SHIFT}",),
        wrap=ZeroShot,
    ),
    "CLIPModel": Family(
        build=of_transformers(
            "CLIPModel",
            transformers.CLIPConfig(
                vision_config=VISION, text_config=CLIP_TEXT, projection_dim=FEATURES
            ),
        ),
        batch=lambda count: images(count, 16) | {"input_ids": tokens(count, C)},
        qk=(f"{{vision,text}}{CLIP_QK}",),
        shifts=(f"{{vision,text}}{CLIP_SHIFT}",),
        wrap=Contrast,
    ),
    "ViTForImageClassification": Family(
        build=of_transformers(
            "ViTForImageClassification", transformers.ViTConfig(**VISION, num_labels=C)
        ),
        batch=lambda count: images(count, 16),
        qk=("vit.layers.*.attention.{q_proj,k_proj}.{weight,bias}",),
        shifts=("vit.layers.*.attention.k_proj.bias",),
    ),
    "BertForSequenceClassification": Family(
        build=of_transformers(
            "BertForSequenceClassification", transformers.BertConfig(**TEXT, num_labels=C)
        ),
        batch=padded,
        qk=(f"bert.{BERT_QK}",),
        shifts=(f"bert.{BERT_SHIFT}",),
    ),
    "RobertaForSequenceClassification": Family(
        build=of_transformers(
            "RobertaForSequenceClassification", transformers.RobertaConfig(**TEXT, num_labels=C)
        ),
        batch=padded,
        qk=(f"roberta.{BERT_QK}",),
        shifts=(f"roberta.{BERT_SHIFT}",),
    ),
    "DistilBertForSequenceClassification": Family(
        build=of_transformers(
            "DistilBertForSequenceClassification",
            transformers.DistilBertConfig(**DISTILLED, num_labels=C),
        ),
        batch=padded,
        qk=("distilbert.transformer.layer.*.attention.{q_lin,k_lin}.{weight,bias}",),
        shifts=("distilbert.transformer.layer.*.attention.k_lin.bias",),
    ),
    "T5ForConditionalGeneration v1.0": Family(
        build=of_transformers("T5ForConditionalGeneration", transformers.T5Config(**T5)),
        batch=seq2seq,
        qk=T5_QK,
    ),
    "T5ForConditionalGeneration v1.1": Family(
        build=t5_of_a_checkpoint,
        batch=seq2seq,
        qk=T5_QK,
    ),
    "GPT2LMHeadModel": Family(
        build=of_transformers("GPT2LMHeadModel", transformers.GPT2Config(**GPT2)),
        batch=padded,
        qk=None,
    ),
    "GPT2ForSequenceClassification": Family(
        build=of_transformers(
            "GPT2ForSequenceClassification",
            transformers.GPT2Config(**GPT2, num_labels=C, pad_token_id=1),
        ),
        batch=padded,
        qk=None,
    ),
    "LlamaForCausalLM": Family(
        build=of_transformers("LlamaForCausalLM", transformers.LlamaConfig(**GROUPED)),
        batch=padded,
        qk=(LLAMA_QK,),
    ),
    "Qwen2ForCausalLM": Family(
        build=of_transformers(
            "Qwen2ForCausalLM",
            transformers.Qwen2Config(**GROUPED, tie_word_embeddings=True),
        ),
        batch=padded,
        qk=(LLAMA_QK, "model.layers.*.self_attn.{q_proj,k_proj}.bias"),
    ),
    "Qwen3ForCausalLM": Family(
        build=of_transformers(
            "Qwen3ForCausalLM",
            transformers.Qwen3Config(**GROUPED, tie_word_embeddings=True),
        ),
        batch=padded,
        qk=(LLAMA_QK,),
    ),
    "MixtralForCausalLM": Family(
        build=of_transformers(
            "MixtralForCausalLM",
            transformers.MixtralConfig(**EXPERTS, num_local_experts=4),
            experts_implementation="eager",
        ),
        batch=padded,
        qk=(LLAMA_QK,),
    ),
    "Qwen3MoeForCausalLM": Family(
        build=of_transformers(
            "Qwen3MoeForCausalLM",
            transformers.Qwen3MoeConfig(**EXPERTS, num_experts=4, moe_intermediate_size=20),
            experts_implementation="eager",
        ),
        batch=padded,
        qk=(LLAMA_QK,),
    ),
    "GptOssForCausalLM": Family(
        build=of_transformers(
            "GptOssForCausalLM",
            transformers.GptOssConfig(**EXPERTS, num_local_experts=4),
            experts_implementation="eager",
        ),
        batch=padded,
        qk=(LLAMA_QK, "model.layers.*.self_attn.{q_proj,k_proj}.bias"),
        attentions=("eager",),
    ),
    "timm VisionTransformer": Family(
        build=timm_vit,
        batch=lambda count: {"x": torch.randn(count, 3, 16, 16)},
        qk=("blocks.*.attn.qkv.{weight,bias}",),
        fused=True,
    ),
    "timm VisionTransformer, qk_norm": Family(
        build=lambda attention: timm_vit(attention, qk_norm=True, init_values=0.5),
        batch=lambda count: {"x": torch.randn(count, 3, 16, 16)},
        qk=("blocks.*.attn.qkv.{weight,bias}",),
        fused=True,
        shifts=("blocks.*.attn.k_norm.bias",),
    ),
}
VARIANTS = [(name, each) for name, family in FAMILIES.items() for each in family.attentions]


def cast(batch: Batch, dtype: torch.dtype) -> Batch:
    """The batch with its floating-point tensors in `dtype`."""
    return {key: x.to(dtype) if x.is_floating_point() else x for key, x in batch.items()}


def split(batch: Batch, size: int, order: Sequence[int] | None = None) -> list[Batch]:
    """The samples of a batch in another order, `size` at a time."""
    count = len(next(iter(batch.values())))
    rows = torch.tensor(range(count) if order is None else order)
    return [{key: x[part] for key, x in batch.items()} for part in rows.split(size)]


def logits_of(model: nn.Module, batch: Batch) -> Tensor:
    output = model(**batch)
    logits: Tensor = getattr(output, "logits", output)
    return logits


def counted(sample: Batch) -> Tensor:
    """The positions of a sample that have a label: all but padding."""
    return sample["labels"][0] != -100 if "labels" in sample else sample["attention_mask"][0] > 0


def targets(log_probs: Tensor, index: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Shares and log-probabilities of a sample's labels: each of [C], or a drawn one of [T, V]."""
    if log_probs.dim() == 1:
        yield from zip(log_probs.detach().exp(), log_probs, strict=True)
        return
    totals = log_probs.detach().double().exp().cumsum(1)
    uniform = np.random.default_rng([0, 0, index, 0]).random(len(totals))
    labels = (totals <= torch.from_numpy(uniform)[:, None] * totals[:, -1:]).sum(1)
    yield torch.ones(()), log_probs[torch.arange(len(labels)), labels].sum()


def loop(model: nn.Module, samples: list[Batch], chosen: Iterable[str]) -> Scores:
    """sum_x sum_y p(y|x) (d log p(y|x) / d theta)^2, one sample at a time, in the model's dtype."""
    named = named_parameters(model)
    params = {name: named[name] for name in chosen}
    scores = {name: torch.zeros_like(param, dtype=torch.float64) for name, param in params.items()}
    for index, sample in enumerate(samples):
        log_probs = logits_of(model, sample)[0].log_softmax(-1)
        if log_probs.dim() == 2:
            log_probs = log_probs[counted(sample)]
        for share, target in targets(log_probs, index):
            grads = torch.autograd.grad(target, list(params.values()), retain_graph=True)
            for name, grad in zip(params, grads, strict=True):
                scores[name] += share * grad.double().square()
    return scores


def error(actual: Tensor, expected: Tensor) -> float:
    """The relative error by norm."""
    return float((actual.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize(("name", "attention"), VARIANTS)
def test_scores_equal_the_loop_of_single_samples(
    name: str, attention: str, dtype: torch.dtype
) -> None:
    family = FAMILIES[name]
    model, batch = family.model(attention), family.batch(N)
    chosen, shifts = set(select_parameters(model)), expand(family.shifts)
    in_double, scored, inputs = copy.deepcopy(model).double(), model.to(dtype), cast(batch, dtype)
    draws: Any = "exact" if logits_of(scored, inputs).dim() == 2 else 1
    for order, sizes in (((0, 1, 2, 3, 4), (1, 3, N)), ((3, 0, 4, 2, 1), (3,))):
        expected = loop(in_double, split(cast(batch, torch.float64), 1, order), chosen)
        # What float32 does to the model itself no scoring can undo.
        rounded = loop(scored, split(inputs, 1, order), chosen) if dtype.itemsize < 8 else expected
        largest = max(float(each.max()) for each in expected.values())
        for size in sizes:
            scores = fisher_diag(scored, split(inputs, size, order), draws=draws)
            assert set(scores) == chosen
            for key, score in scores.items():
                if pattern_of(key) in shifts:  # exactly 0, but for rounding, squared
                    assert max(score.max(), expected[key].max()) < 1e-12 * largest, key
                else:
                    assert float(score.max()) > 1e-6 * largest, key
                    bound = max(1e-5, 2 * error(rounded[key], expected[key]))
                    assert error(score, expected[key]) <= bound, key


@pytest.mark.parametrize("name", FAMILIES)
def test_qk_scores_queries_and_keys_alone(name: str) -> None:
    family = FAMILIES[name]
    model = family.model(family.attentions[-1]).double()
    batch = [cast(family.batch(N), torch.float64)]
    if family.qk is None:
        with pytest.raises(
            TalosValueError, match=r"c_attn, a .*Conv1D, which stores them in columns"
        ):
            fisher_diag(model, batch, params="qk")
        return
    scores, everything = fisher_diag(model, batch, params="qk"), fisher_diag(model, batch)
    largest = max(float(each.max()) for each in everything.values())
    assert {pattern_of(key) for key in scores} == expand(family.qk)
    assert set(scores.rows) == (set(scores) if family.fused else set())
    for key, score in scores.items():
        stop = 2 * len(score) // 3 if family.fused else len(score)
        assert scores.rows.get(key, (0, stop)) == (0, stop)
        whole = everything[key][:stop]  # of what is 0 but for rounding nothing else is known
        torch.testing.assert_close(score[:stop], whole, rtol=1e-5, atol=1e-12 * largest)
        assert not score[stop:].any()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["open_clip ViT-B-16 visual", "BertForSequenceClassification"])
def test_bfloat16_keeps_the_weights_that_float32_keeps(name: str) -> None:
    family = FAMILIES[name]
    model, samples = family.model(family.attentions[-1]), split(family.batch(64), 16)

    def kept(model: nn.Module, dtype: torch.dtype = torch.float32) -> Mask:
        inputs = [cast(each, dtype) for each in samples]
        return Mask.from_scores(fisher_diag(model, inputs, draws="exact"), 0.1)

    expected = kept(model)
    with torch.autocast("cpu", torch.bfloat16):
        autocast = kept(model)
    stored = kept(model.bfloat16(), torch.bfloat16)
    for mask in (autocast, stored):
        assert (mask & expected).nnz >= 0.99 * expected.nnz, (mask & expected).nnz / expected.nnz
