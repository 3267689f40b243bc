"""`talos calibrate`: find the weights that matter least."""

import shlex
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from talos.app.cli.console import (
    Bars,
    command,
    next_step,
    on_interrupt,
    per_second,
    print_line,
    stdout,
    unused,
)
from talos.app.cli.options import (
    Batch,
    Data,
    Json,
    Length,
    Model,
    Overwrite,
    Seed,
    check_choice,
    check_output,
)
from talos.app.cli.records import check_json, table_record, write_record
from talos.errors import TalosValueError
from talos.options import fraction, integer

if TYPE_CHECKING:
    from torch import Tensor

    from talos.app.models import Classifier

__all__ = ["EXAMPLES", "calibrate"]

EXAMPLES = (
    "talos calibrate --data docstring_topic --out mask.safetensors",
    "talos calibrate --data reviews.csv --density 0.05 --samples 512 --out mask.safetensors",
    "talos calibrate --data reviews.jsonl --params qk --draws exact --out mask.safetensors",
    "talos calibrate --model openclip:ViT-B-32:openai --data photos --dry-run --layers",
    "talos calibrate --model t5-small --data reviews.csv --check --out mask.safetensors",
)

SAMPLES = 256  # the default, where the task has as many


def calibrate(
    context: typer.Context,
    data: Data,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="The file to write (.safetensors); not needed with --dry-run."),
    ] = None,
    model: Model = "minilm",
    density: Annotated[
        float, typer.Option("--density", help="Fraction of the weights to train, in (0, 1].")
    ] = 0.1,
    rounds: Annotated[
        int, typer.Option("--rounds", help="Rounds of scoring; each drops some weights.")
    ] = 4,
    samples: Annotated[
        int | None,
        typer.Option(
            "--samples", help="Training examples to score on; by default 256, or all if fewer."
        ),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            "--target",
            help="The function to differentiate: log_prob or logit; by default log_prob, or logit "
            "with --parity released.",
        ),
    ] = None,
    draws: Annotated[
        str, typer.Option("--draws", help="Labels to draw per sample, or exact: use all labels.")
    ] = "1",
    labels: Annotated[
        str,
        typer.Option(
            "--labels",
            help="sampled: draw labels from the model; importance: draw labels with large "
            "gradients more often and weight them, for less noise.",
        ),
    ] = "sampled",
    parity: Annotated[
        str,
        typer.Option("--parity", help="paper, or released: follow the authors' released code."),
    ] = "paper",
    params: Annotated[
        str,
        typer.Option(
            "--params",
            help="The parameters to score: maskable, qk, attention, or a regular expression.",
        ),
    ] = "maskable",
    check: Annotated[
        bool,
        typer.Option(
            "--check",
            metavar="",
            help="First compare the scores of three samples with plain autograd.",
        ),
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", metavar="", help="Show what would be scored; score and write nothing."
        ),
    ] = False,
    layers: Annotated[
        bool, typer.Option("--layers", metavar="", help="Show a row for each layer and type.")
    ] = False,
    json: Json = None,
    batch_size: Batch = 32,
    max_length: Length = None,
    seed: Seed = 0,
    overwrite: Overwrite = False,
) -> None:
    """Find the weights that matter least, and write them as a mask.

    The score of a weight is the diagonal of the Fisher information on a few hundred examples. The
    mask holds the weights with the lowest scores (TaLoS, arXiv 2504.02620); `talos train` trains
    them.

    --dry-run shows which weights would be scored, which not and why, and the memory it takes.
    """
    fraction("--density", density)
    integer("--rounds", rounds, 1)
    if samples is not None:
        integer("--samples", samples, 1)
    integer("--batch-size", batch_size, 1)
    if max_length is not None:
        integer("--max-length", max_length, 3)
    if target is not None:
        check_choice("--target", target, ("log_prob", "logit"))
    check_choice("--labels", labels, ("sampled", "importance"))
    check_choice("--parity", parity, ("paper", "released"))
    if parity == "released" and target == "log_prob":
        raise TalosValueError("--target must be logit with --parity released, got log_prob")
    if draws != "exact" and not (draws.isdecimal() and len(draws) < 10 and int(draws) > 0):
        raise TalosValueError(
            f"--draws must be exact or at least 1 and below a billion, got {draws:.20}"
        )
    if labels == "importance" and (draws == "exact" or target == "logit" or parity == "released"):
        raise TalosValueError(
            "--labels must be sampled with --draws exact, --target logit and --parity released, "
            "got importance"
        )
    if dry_run and json is not None:
        raise TalosValueError(f"--json must be left out with --dry-run, got {json}")
    check_json(json, overwrite)
    if out is not None:
        check_output(out, overwrite)
    elif not dry_run:
        raise TalosValueError("--out must be a file to write, got none; or pass --dry-run")
    from talos.app.cli.loading import load_classifier, load_data
    from talos.app.cli.reading import show_data, tokens_for
    from talos.app.experiments.judging import calibration_batches
    from talos.app.provenance import base_of, made_with
    from talos.calibration import calibrate as find
    from talos.calibration.fisher import CalibrationProgress
    from talos.distributed import rank
    from talos.tensors import readable_size

    console = stdout(json)
    with on_interrupt("nothing was written"), Bars() as bars:
        task = load_data(data)
        samples = min(SAMPLES, len(task.train)) if samples is None else samples
        if samples > len(task.train):
            raise TalosValueError(
                f"--samples must be at most {len(task.train)}, the training examples of "
                f"{task.name}, got {samples}; leave it out to use 256 or all there are"
            )
        classifier = load_classifier(model, task)
        tokens = tokens_for(task, classifier.encoder, max_length)
        longer = show_data(task, classifier.encoder, tokens)
        batches = calibration_batches(
            task,
            classifier.encoder,
            count=min(samples, batch_size) if dry_run else samples,
            batch_size=batch_size,
            max_length=tokens,
            seed=seed,
        )
        if out is None or dry_run:
            _show_plan(console, classifier, batches[0], params, density, samples, rounds, layers)
            out = out or unused(Path("mask.safetensors"))
            next_step(_again(context, out, longer if max_length is None else None))
            return

        def show(progress: CalibrationProgress) -> None:
            done = (progress.round - 1) * samples + progress.samples
            bars.show(f"calibrate {task.name}", done, rounds * samples, unit="samples")

        bars.show(f"calibrate {task.name}", 0, rounds * samples, unit="samples")
        options: dict[str, Any] = {"labels": labels, "parity": parity, "check": check}
        if target is not None:
            options["target"] = target
        start = time.monotonic()
        mask = find(
            classifier,
            batches,
            density,
            rounds,
            params=params,
            draws="exact" if draws == "exact" else int(draws),
            seed=seed,
            on_progress=show,
            **options,
        )
        seconds = time.monotonic() - start
        if rank() > 0:  # all ranks have the same mask; one writes it
            return
        made = {**mask.metadata, **made_with(task, classifier.encoder, tokens)}
        mask = replace(mask, metadata={**made, "base": base_of(mask, classifier)})
        mask.save(out)
    described = mask.describe(layers=layers)
    print_line(console, str(described))
    print_line(
        console,
        f"\n{out}: {mask.nnz:,} of {mask.numel:,} entries (density {mask.density:.3f}), "
        f"{readable_size(out.stat().st_size)}; {per_second(rounds * samples, seconds)} samples/s",
    )
    figures = {"file": str(out), "bytes": out.stat().st_size, **table_record(described)}
    write_record(json, "calibrate", figures | {"seconds": round(seconds, 3), "metadata": made})
    if (stability := made.get("stability")) is not None:
        print_line(
            console,
            f"stability {stability:.2f}: the share of the last round's selection on which two "
            f"halves of the samples agree ({made['stability_by_chance']:.2f} by chance)",
        )
    next_step(
        command("inspect", out),
        command(
            *("train", "--model", model, "--data", data, "--mask", out),
            *("--out", "vector.safetensors"),
        ),
    )


def _show_plan(
    console: Console,
    classifier: "Classifier",
    batch: "Mapping[str, Tensor]",
    params: str,
    density: float,
    samples: int,
    rounds: int,
    layers: bool,
) -> None:
    """Print what would be scored and selected, and the memory it takes."""
    from talos.app.cli.plan import SCORED, activation_bytes, shares, shares_table
    from talos.tensors import readable_size

    found = shares(classifier, params)
    console.print(shares_table(found, layers=layers))
    scored = [each for each in found if each.fate == SCORED]
    entries = sum(each.numel for each in scored)
    print_line(
        console,
        f"\n{round(density * entries):,} of {entries:,} entries will be selected "
        f"(density {density:g})",
    )
    size = len(batch["labels"])
    weights = sum(each.nbytes for each in scored) if rounds > 1 else 0
    inputs = sum(each.nbytes for each in batch.values())
    for what, nbytes in (
        (f"sums of the scores of {entries:,} entries, float64", 8 * entries),
        ("copies of these weights, kept between the rounds", weights),
        (f"{samples:,} samples", inputs * samples // size),
        (f"activations of a batch of {size:,}", activation_bytes(classifier, batch)),
    ):
        print_line(console, f"{readable_size(nbytes):>10}  {what}")


def _again(context: typer.Context, out: Path, longer: int | None) -> str:
    """Return the command line that does what the dry run shows, with texts of this length."""
    words = ["talos", "calibrate"]
    for option in context.command.params:
        value = context.params.get(option.name or "")
        if option.name not in ("out", "dry_run", "layers") and value != option.default:
            words += [option.opts[0]] if value is True else [option.opts[0], str(value)]
    words += [] if longer is None else ["--max-length", str(longer)]
    return shlex.join([*words, "--out", str(out)])
