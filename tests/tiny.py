"""A BERT with random weights and a character vocabulary, in a folder as transformers saves it."""

import csv
from pathlib import Path

import torch
from transformers import BertConfig, BertModel, BertTokenizerFast

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789_.,:;()[]{}=+-*/<>'\"#@!?%&|\\"
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *(f"##{c}" for c in LETTERS)]


def save_tiny_encoder(folder: Path) -> Path:
    """Writes the model and its tokenizer, always the same ones."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = BertModel(
            BertConfig(
                vocab_size=len(VOCABULARY),
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=64,
                max_position_embeddings=64,
            )
        )
    model.save_pretrained(folder, safe_serialization=True)
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


def save_pets(folder: Path, pairs: int, *rows: tuple[str, str]) -> Path:
    """Writes texts of cats and dogs in turn, then further rows of a text and its label."""
    path = folder / "pets.csv"
    with path.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["text", "label"])
        for i in range(pairs):
            writer.writerow([f"meow {i}, purr", "cat"])
            writer.writerow([f"woof {i}, bark", "dog"])
        writer.writerows(rows)
    return path
