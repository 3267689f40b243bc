"""`talos calibrate`: which weights matter least."""

from dataclasses import replace
from typing import Annotated

import typer

from talos.cli.console import Bars, keeping, next_step, say, stdout
from talos.cli.options import (
    Batch,
    Data,
    Length,
    Model,
    Out,
    Overwrite,
    Seed,
    check_at_least,
    check_density,
    check_output,
)
from talos.errors import TalosValueError

__all__ = ["EXAMPLES", "calibrate"]

EXAMPLES = (
    "talos calibrate --data docstring_topic --out mask.safetensors",
    "talos calibrate --data reviews.csv --density 0.05 --samples 512 --out mask.safetensors",
    "talos calibrate --data reviews.jsonl --params qk --draws exact --out mask.safetensors",
)

SAMPLES = 256  # the default, where the task has as many


def calibrate(
    data: Data,
    out: Out,
    model: Model = "minilm",
    density: Annotated[
        float, typer.Option("--density", help="Fraction of the weights to train, in (0, 1].")
    ] = 0.1,
    rounds: Annotated[
        int, typer.Option("--rounds", help="Rounds of scoring; each drops a part.")
    ] = 4,
    samples: Annotated[
        int | None,
        typer.Option(
            "--samples", help="Training examples to score on; by default 256, or all there are."
        ),
    ] = None,
    target: Annotated[
        str, typer.Option("--target", help="What is differentiated: log_prob or logit.")
    ] = "log_prob",
    draws: Annotated[
        str, typer.Option("--draws", help="Labels drawn for each sample, or exact: all of them.")
    ] = "1",
    params: Annotated[
        str, typer.Option("--params", help="Where to look: maskable, qk, or a regular expression.")
    ] = "maskable",
    batch_size: Batch = 32,
    max_length: Length = 48,
    seed: Seed = 0,
    overwrite: Overwrite = False,
) -> None:
    """Find the weights that matter least, and write them as a mask.

    Scores each weight by the diagonal of the Fisher information on a few hundred examples and keeps
    the lowest (TaLoS, arXiv 2504.02620). Those are the weights that `talos train` then trains.
    """
    check_density(density)
    check_at_least("--rounds", rounds, 1)
    if samples is not None:
        check_at_least("--samples", samples, 1)
    check_at_least("--batch-size", batch_size, 1)
    check_at_least("--max-length", max_length, 3)
    if target not in ("log_prob", "logit"):
        raise TalosValueError(f"--target must be log_prob or logit, got {target}")
    if draws != "exact" and not (draws.isdecimal() and int(draws) > 0):
        raise TalosValueError(f"--draws must be exact or at least 1, got {draws}")
    check_output(out, overwrite)
    from talos.calibration import CalibrationProgress
    from talos.calibration import calibrate as find
    from talos.cli.loading import load_classifier, load_data
    from talos.demo.judge import training_batches
    from talos.report.results import megabytes

    with keeping("nothing was written"), Bars() as bars:
        task = load_data(data)
        samples = min(SAMPLES, len(task.train)) if samples is None else samples
        if samples > len(task.train):
            raise TalosValueError(
                f"--samples must be at most {len(task.train)}, the training examples of "
                f"{task.name}, got {samples}; leave it out to use 256 or all there are"
            )
        classifier = load_classifier(model, task)
        batches = training_batches(
            task,
            classifier.encoder,
            count=samples,
            batch_size=batch_size,
            max_length=max_length,
            seed=seed,
        )

        def show(progress: CalibrationProgress) -> None:
            done = (progress.round - 1) * samples + progress.samples
            bars.show(f"calibrate {task.name}", done, rounds * samples)

        bars.show(f"calibrate {task.name}", 0, rounds * samples)
        mask = find(
            classifier,
            batches,
            density,
            rounds,
            params=params,
            target="log_prob" if target == "log_prob" else "logit",
            draws="exact" if draws == "exact" else int(draws),
            seed=seed,
            on_progress=show,
        )
        made = {**mask.metadata, "model": classifier.encoder.name, "task": task.name}
        mask = replace(mask, metadata=made)
        mask.save(out)
    console = stdout()
    say(
        console,
        f"{out}: {mask.nnz:,} of {mask.numel:,} entries (density {mask.density:.3f}), "
        f"{megabytes(out.stat().st_size)}",
    )
    next_step(
        console,
        f"talos inspect {out}",
        f"talos train --model {model} --data {data} --mask {out} --out vector.safetensors",
    )
