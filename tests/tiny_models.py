"""Small language models, CLIP models and images with random content, saved to files."""

import json
from pathlib import Path

import numpy as np
import open_clip
import torch
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

LETTERS = " abcdefghijklmnopqrstuvwxyz0123456789,.:"
CLIP = "tiny-clip"
SPECIAL = ("<pad>", "</s>", "<unk>")


def save_tiny_t5(folder: Path) -> Path:
    """Writes an encoder-decoder and its tokenizer of letters, which ends texts with </s>."""
    config = T5Config(
        vocab_size=len(SPECIAL) + len(LETTERS),
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
        initializer_factor=0.5,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        T5ForConditionalGeneration(config).save_pretrained(folder)
    letters = _letters()
    letters.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    _save_tokenizer(letters, folder, pad_token="<pad>")
    return folder


def save_tiny_gpt2(folder: Path) -> Path:
    """Writes a decoder and its tokenizer of letters, which has no token to pad with."""
    config = GPT2Config(
        vocab_size=len(SPECIAL) + len(LETTERS),
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=96,
        bos_token_id=1,
        eos_token_id=1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        GPT2LMHeadModel(config).save_pretrained(folder)
    _save_tokenizer(_letters(), folder)
    return folder


def save_tiny_clip(folder: Path) -> Path:
    """Makes the architecture `CLIP` known to open_clip and writes weights for it."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "embed_dim": 16,
        "vision_cfg": {
            "image_size": 32,
            "layers": 2,
            "width": 32,
            "patch_size": 16,
            "head_width": 16,
        },
        "text_cfg": {
            "context_length": 16,
            "vocab_size": 49408,
            "width": 16,
            "heads": 2,
            "layers": 1,
        },
    }
    if CLIP not in open_clip.list_models():
        (folder / f"{CLIP}.json").write_text(json.dumps(config))
        open_clip.add_model_config(folder / f"{CLIP}.json")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = open_clip.create_model(CLIP)
    path = folder / "tiny.safetensors"
    save_file(model.state_dict(), path)
    return path


def save_tiny_transformers_clip(folder: Path) -> Path:
    """Writes a CLIP of transformers with its image processor and a tokenizer of letters."""
    tower = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    text = {"vocab_size": len(SPECIAL) + len(LETTERS), "max_position_embeddings": 24}
    config = CLIPConfig(
        text_config={**tower, **text, "num_attention_heads": 2, "eos_token_id": 1},
        vision_config={**tower, "num_attention_heads": 2, "image_size": 32, "patch_size": 16},
        projection_dim=16,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        CLIPModel(config).save_pretrained(folder)
    size = {"height": 32, "width": 32}
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size).save_pretrained(folder)
    letters = _letters()
    letters.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    _save_tokenizer(letters, folder, pad_token="<pad>")
    return folder


def save_images(folder: Path, classes: dict[str, int], *, size: int = 24) -> Path:
    """Writes PNG files of noise, so many a class, whose brightness tells the class."""
    draw = np.random.default_rng(0)
    for place, (name, count) in enumerate(classes.items()):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            pixels = draw.integers(0, 100, (size, size, 3)) + 150 * place / max(1, len(classes) - 1)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{i:03}.png")
    return folder


def _letters() -> Tokenizer:
    vocabulary = {word: place for place, word in enumerate((*SPECIAL, *LETTERS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    return tokenizer


def _save_tokenizer(letters: Tokenizer, folder: Path, **special: str) -> None:
    PreTrainedTokenizerFast(
        tokenizer_object=letters, eos_token="</s>", unk_token="<unk>", **special
    ).save_pretrained(folder)
