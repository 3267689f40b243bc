"""`talos train`: fine-tune, and write what changed."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from talos.app.cli.console import Bars, keeping, next_step, say, stdout
from talos.app.cli.options import (
    Batch,
    Data,
    Length,
    Model,
    Out,
    Overwrite,
    Seed,
    check_at_least,
    check_choice,
    check_density,
    check_input,
    check_output,
    check_positive,
)
from talos.errors import TalosValueError
from talos.methods import METHODS

__all__ = ["EXAMPLES", "train"]

EXAMPLES = (
    "talos train --data docstring_topic --mask mask.safetensors --out vector.safetensors",
    "talos train --data reviews.csv --mask mask.safetensors --steps 200 --out vector.safetensors",
    "talos train --data docstring_topic --out dense.safetensors",
    "talos train --data docstring_topic --method l_lora --rank 8 --out vector.safetensors",
)

_RANKED, _DENSE = ("l_lora",), ("lota", "random", "magnitude")


def _rates() -> str:
    """The usual learning rates, each with its methods."""
    rates: dict[float, list[str]] = {}
    for name, each in METHODS.items():
        rates.setdefault(each.usual_lr, []).append(name)
    return "; ".join(f"{rate:g} for {', '.join(names)}" for rate, names in rates.items())


def train(
    data: Data,
    out: Out,
    model: Model = "minilm",
    mask: Annotated[
        Path | None,
        typer.Option("--mask", help="Train what this mask selects; for --method talos only."),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            "--method",
            help=f"{', '.join(METHODS)}. By default talos with a mask, nonlinear without.",
        ),
    ] = None,
    rank: Annotated[
        int | None, typer.Option("--rank", help="Of l_lora's adapters, by default 16.")
    ] = None,
    density: Annotated[
        float | None,
        typer.Option(
            "--density",
            help="Fraction that lota (of all weights), random and magnitude (of the maskable ones) "
            "train, by default 0.1.",
        ),
    ] = None,
    sparse_lr: Annotated[
        float | None,
        typer.Option(
            "--sparse-lr",
            help="Peak learning rate of lota's second, sparse training, by default that of --lr.",
        ),
    ] = None,
    steps: Annotated[int, typer.Option("--steps", help="Optimizer steps.")] = 80,
    lr: Annotated[
        float | None,
        typer.Option("--lr", help=f"Peak learning rate. By default {_rates()}."),
    ] = None,
    batch_size: Batch = 32,
    max_length: Length = 48,
    seed: Seed = 0,
    overwrite: Overwrite = False,
) -> None:
    """Fine-tune an encoder and write its task vector.

    With a mask only the selected weights are trained, and the vector holds only those.

    Other methods: nonlinear trains every weight; linearized too, on the model's first-order
    expansion (evaluate its vectors with `talos eval --linearized`); l_lora linearized low-rank
    adapters on queries and values; lota what moves most under full fine-tuning, in twice the steps;
    attention_only the projections of attention; random and magnitude as many weights as talos,
    drawn or the smallest ones.
    """
    method = _checked_method(method, mask, rank, density, sparse_lr)
    check_at_least("--steps", steps, 1)
    check_at_least("--batch-size", batch_size, 1)
    check_at_least("--max-length", max_length, 3)
    rate = lr if lr is not None else METHODS[method].usual_lr
    check_positive("--lr", rate)
    if mask is not None:
        check_input("--mask", mask)
    check_output(out, overwrite)
    import torch

    from talos.app.cli.loading import load_classifier, load_data
    from talos.app.demo.judge import training_batches
    from talos.app.report.results import megabytes
    from talos.masks import Mask
    from talos.methods import method_of
    from talos.training import FineTuneStep, fine_tune

    with keeping("nothing was written"), Bars() as bars:
        given = {"rank": rank, "density": density, "sparse_lr": sparse_lr}
        chosen = method_of(
            method,
            Mask.load(mask) if mask is not None else None,
            {key: value for key, value in given.items() if value is not None},
        )
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
        losses: list[float] = []

        def on_step(step: FineTuneStep) -> None:
            losses.append(step.loss)
            bars.show(f"train {task.name}", step.step, step.steps, step.loss)

        bars.show(f"train {task.name}", 0, steps * chosen.phases)
        vector = fine_tune(
            classifier, batches, method=chosen, steps=steps, lr=rate, on_step=on_step
        )
        made = {"model": classifier.encoder.name, "task": task.name, "steps": steps}
        vector = replace(vector, metadata={**vector.metadata, **made, "lr": rate, "seed": seed})
        vector.save(out)
    console = stdout()
    say(
        console,
        f"{out}: {vector.mask.nnz:,} entries, {megabytes(out.stat().st_size)}; "
        f"loss {losses[0]:.3f} at the first step, {losses[-1]:.3f} at the last",
    )
    where = " --linearized" if method == "linearized" else ""
    next_step(
        console,
        f"talos eval --model {model} --data {data} --vector {out} --scale grid{where}",
        f"talos merge {out}:0.5 SECOND.safetensors:0.5 --out edit.safetensors",
    )


def _checked_method(
    method: str | None,
    mask: Path | None,
    rank: int | None,
    density: float | None,
    sparse_lr: float | None,
) -> str:
    """The method's name, after a look at the options that go with it."""
    if method is None:
        method = "nonlinear" if mask is None else "talos"
    check_choice("--method", method, tuple(METHODS))
    if method == "talos" and mask is None:
        raise TalosValueError(
            "--mask must be given with --method talos, got none; make one with talos calibrate"
        )
    if method != "talos" and mask is not None:
        raise TalosValueError(f"--mask must be left out with --method {method}, got {mask}")
    for option, value, takers in (
        ("--rank", rank, _RANKED),
        ("--density", density, _DENSE),
        ("--sparse-lr", sparse_lr, ("lota",)),
    ):
        if value is not None and method not in takers:
            raise TalosValueError(
                f"{option} must be left out with --method {method}, got {value}; it is for "
                f"{', '.join(takers)}"
            )
    if rank is not None:
        check_at_least("--rank", rank, 1)
    if density is not None:
        check_density(density)
    if sparse_lr is not None:
        check_positive("--sparse-lr", sparse_lr)
    return method
