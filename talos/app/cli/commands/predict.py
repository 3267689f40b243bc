"""`talos predict`: labels and probabilities of texts or images, from an exported model."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from talos.app.cli.console import Bars, command, note, on_interrupt, print_line, stdout
from talos.app.cli.options import Batch, Overwrite, check_choice, check_output
from talos.app.tasks.splits import SPLITS
from talos.errors import TalosValueError
from talos.options import integer

if TYPE_CHECKING:
    from torch import Tensor

    from talos.app.models.heads import Head
    from talos.app.tasks.unlabelled import Rows

__all__ = ["EXAMPLES", "predict"]

EXAMPLES = (
    "talos predict --model edited --data reviews.csv",
    "talos predict --model edited --data reviews.jsonl --out predictions.jsonl",
    "talos predict --model edited --data reviews.csv --split test",
    "talos predict --model edited --data photos --task pets --out predictions.csv",
)
_SUFFIXES = (".csv", ".jsonl")


def predict(
    model: Annotated[
        str,
        typer.Option("--model", help="The folder that `talos export --data` wrote."),
    ],
    data: Annotated[
        str,
        typer.Option(
            "--data",
            help="A .csv, .tsv or .jsonl file with the column text; a column label may be there or "
            "not. For CLIP a folder of images.",
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", help="The file to write, .csv or .jsonl; by default CSV on stdout."),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option("--task", help="The task to answer, where the model has heads of several."),
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(
            "--split",
            help="Only a split of the data, as `talos eval` makes it: train, validation or test. "
            "Then --data is a task, as `talos train` takes it.",
        ),
    ] = None,
    batch_size: Batch = 128,
    overwrite: Overwrite = False,
) -> None:
    """Predict the labels of texts or images with an exported model.

    The classifier is the one that `talos eval` judged: the head in the folder was made with the
    weights of the base. Each row of the output has the text or image, the label if the data has
    one, the prediction, its probability, and the probability of each label. Rows keep their order.
    """
    integer("--batch-size", batch_size, 1)
    if split is not None:
        check_choice("--split", split, SPLITS)
    if out is not None:
        if out.suffix.lower() not in _SUFFIXES:
            raise TalosValueError(f"--out must end in {' or '.join(_SUFFIXES)}, got {out}")
        check_output(out, overwrite, out.suffix)
    lines = out is not None and out.suffix.lower() == ".jsonl"
    from talos.app.cli.loading import load_encoder, load_rows
    from talos.app.cli.reading import show_rows
    from talos.app.experiments.judging import logits_of
    from talos.files import atomic_write

    with on_interrupt("nothing was written"), Bars() as bars:
        found = _saved_heads(model)
        rows = load_rows(data, model, split)
        encoder = load_encoder(model)
        head = _chosen(found or encoder.heads, task, model)
        asked = rows.task(head.class_names, head.class_texts)
        classifier = head.classifier(encoder)
        show_rows(asked, encoder, head.max_length)
        bars.show("predict", 0, len(rows.names))
        logits = logits_of(
            classifier,
            asked,
            "test",
            batch_size=batch_size,
            max_length=head.max_length,
        )
        bars.show("predict", len(rows.names), len(rows.names))
        shares = logits.double().softmax(1)
        if bool(shares.isnan().any()):
            raise TalosValueError(
                f"--model must give numbers as logits, got NaN or infinity of {model}; export it "
                "again with a smaller coefficient"
            )
        answers = [_answer(rows, place, head, each) for place, each in enumerate(shares)]
        text = _jsonl(answers) if lines else _csv(answers)
        if out is not None:
            atomic_write(out, lambda new: new.write_bytes(text.encode()))
    if out is None:
        typer.echo(text, nl=False)
    else:
        print_line(stdout(), f"{out}: {len(answers):,} predictions of {head.task}")
    _compare(rows, answers, head)


def _saved_heads(model: str) -> "dict[str, Head]":
    """Return the heads in a folder, before the model is loaded; none for a name on the hub.

    Raises:
        TalosValueError: the folder holds none, or the model is no folder of one's own.
    """
    from talos.app.models.heads import HEAD_FILE, load_heads
    from talos.app.models.packages import PACKAGED

    folder = Path(model).expanduser()
    heads = load_heads(folder)
    if not heads and (folder.is_dir() or model in PACKAGED or model.startswith("openclip:")):
        made = command("export", "VECTOR", "--base", "BASE", "--data", "TASK", "--out", "FOLDER")
        raise TalosValueError(
            f"--model must hold the head of a task, got {model} without {HEAD_FILE}; `{made}` "
            "writes a folder with one"
        )
    return heads


def _chosen(heads: "Mapping[str, Head]", task: str | None, model: str) -> "Head":
    """Return the head of the task that was named, or the only one."""
    if task is None and len(heads) == 1:
        return next(iter(heads.values()))
    if task is None or task not in heads:
        got = "none" if task is None else task
        raise TalosValueError(
            f"--task must be one that {model} has a head of ({', '.join(heads)}), got {got}"
        )
    return heads[task]


def _answer(rows: "Rows", place: int, head: "Head", shares: "Tensor") -> dict[str, Any]:
    """Return a row of the output, from the probabilities of the labels."""
    each, best = shares.tolist(), int(shares.argmax())
    key = "image" if rows.reads == "images" else "text"
    return {
        key: rows.names[place],
        **({"label": rows.labels[place]} if any(rows.labels) else {}),
        "prediction": head.class_names[best],
        "probability": round(each[best], 6),
        "probabilities": {
            name: round(value, 6) for name, value in zip(head.class_names, each, strict=True)
        },
    }


def _csv(answers: Sequence[Mapping[str, Any]]) -> str:
    """Return rows as CSV, with a column for the probability of each label."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    plain = [key for key in answers[0] if key != "probabilities"]
    writer.writerow([*plain, *(f"p({name})" for name in answers[0]["probabilities"])])
    for each in answers:
        writer.writerow([*(each[key] for key in plain), *each["probabilities"].values()])
    return stream.getvalue()


def _jsonl(answers: Sequence[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in answers)


def _compare(rows: "Rows", answers: Sequence[Mapping[str, Any]], head: "Head") -> None:
    """Print how many labels of the data were predicted."""
    labelled = [each for each in answers if each.get("label") in head.class_names]
    if labelled:
        right = sum(each["label"] == each["prediction"] for each in labelled)
        share = 100 * right / len(labelled)
        were = "label was" if len(labelled) == 1 else "labels were"
        note(f"{right:,} of {len(labelled):,} {were} predicted: {share:.1f} %")
    others = {label for label in rows.labels if label} - set(head.class_names)
    if others and rows.reads == "texts":
        note(
            f"warning: {rows.source} holds labels that are none of {head.task}'s ({len(others)}), "
            f"as {sorted(others)[0]}; its labels are {', '.join(head.class_names[:5])}"
        )
