"""`talos train`: fine-tune, and write what changed."""

from dataclasses import replace
from pathlib import Path
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
    check_input,
    check_output,
    check_positive,
)

__all__ = ["EXAMPLES", "train"]

EXAMPLES = (
    "talos train --data docstring_topic --mask mask.safetensors --out vector.safetensors",
    "talos train --data reviews.csv --mask mask.safetensors --steps 200 --out vector.safetensors",
    "talos train --data docstring_topic --out dense.safetensors",
)


def train(
    data: Data,
    out: Out,
    model: Model = "minilm",
    mask: Annotated[
        Path | None,
        typer.Option("--mask", help="Train what this mask selects; without it all weights."),
    ] = None,
    steps: Annotated[int, typer.Option("--steps", help="Optimizer steps.")] = 80,
    lr: Annotated[
        float | None,
        typer.Option("--lr", help="Peak learning rate; by default 1e-3 with a mask, else 5e-5."),
    ] = None,
    batch_size: Batch = 32,
    max_length: Length = 48,
    seed: Seed = 0,
    overwrite: Overwrite = False,
) -> None:
    """Fine-tune an encoder and write its task vector.

    With a mask only the selected weights are trained, and the vector holds only those.
    """
    check_at_least("--steps", steps, 1)
    check_at_least("--batch-size", batch_size, 1)
    check_at_least("--max-length", max_length, 3)
    rate = lr if lr is not None else (1e-3 if mask is not None else 5e-5)
    check_positive("--lr", rate)
    if mask is not None:
        check_input("--mask", mask)
    check_output(out, overwrite)
    import torch

    from talos.cli.loading import load_classifier, load_data
    from talos.demo.judge import training_batches
    from talos.masks import Mask
    from talos.report.results import megabytes
    from talos.training import FineTuneFinished, FineTuneStep, fine_tune

    with keeping("nothing was written"), Bars() as bars:
        chosen = Mask.load(mask) if mask is not None else None
        task = load_data(data)
        classifier = load_classifier(model, task)
        batches = training_batches(
            task,
            classifier.encoder,
            count=steps * batch_size,
            batch_size=batch_size,
            max_length=max_length,
            seed=seed,
        )
        torch.manual_seed(seed)  # dropout
        first = last = float("nan")
        bars.show(f"train {task.name}", 0, steps)
        for event in fine_tune(classifier, batches, chosen, steps=steps, lr=rate):
            if isinstance(event, FineTuneStep):
                first = event.loss if event.step == 1 else first
                last = event.loss
                bars.show(f"train {task.name}", event.step, event.steps, event.loss)
            elif isinstance(event, FineTuneFinished):
                vector = event.task_vector
        made = {"model": classifier.encoder.name, "task": task.name, "steps": steps}
        vector = replace(vector, metadata={**vector.metadata, **made, "lr": rate, "seed": seed})
        vector.save(out)
    console = stdout()
    say(
        console,
        f"{out}: {vector.mask.nnz:,} entries, {megabytes(out.stat().st_size)}; "
        f"loss {first:.3f} at the first step, {last:.3f} at the last",
    )
    next_step(
        console,
        f"talos eval --model {model} --data {data} --vector {out} --scale grid",
        f"talos merge {out}:0.5 SECOND.safetensors:0.5 --out edit.safetensors",
    )
