"""`talos train`: fine-tune, and write the task vector."""

import math
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Annotated, Any

import typer

from talos.app.cli.console import (
    Bars,
    command,
    next_step,
    note,
    on_interrupt,
    print_line,
    stdout,
)
from talos.app.cli.options import (
    Batch,
    Data,
    Json,
    Length,
    Model,
    Out,
    Overwrite,
    Seed,
    as_options,
    check_input,
    check_output,
)
from talos.app.cli.processes import several
from talos.app.cli.records import check_json, finite, write_record
from talos.app.cli.suggestions import merge_command, of_model
from talos.app.cli.train_options import checked_method, checked_numbers
from talos.errors import TalosValueError
from talos.options import integer, positive

if TYPE_CHECKING:
    from talos.app.models import Classifier
    from talos.masks import Mask

__all__ = ["EXAMPLES", "facts", "train"]

EXAMPLES = (
    "talos train --data docstring_topic --mask mask.safetensors --out vector.safetensors",
    "talos train --data reviews.csv --mask mask.safetensors --steps 200 --out vector.safetensors",
    "talos train --data docstring_topic --out dense.safetensors",
    "talos train --data docstring_topic --method l_lora --rank 8 --out vector.safetensors",
    "talos train --data reviews.csv --steps 5000 --out dense.safetensors --checkpoint run --resume",
)


def facts() -> dict[str, str]:
    """Return what the help says of the methods."""
    from talos.methods import METHODS

    rates: dict[float, list[str]] = {}
    for name, each in METHODS.items():
        rates.setdefault(each.usual_lr, []).append(name)
    usual = "; ".join(f"{rate:g} for {', '.join(names)}" for rate, names in rates.items())
    return {"methods": ", ".join(METHODS), "rates": usual}


def train(
    data: Data,
    out: Out,
    model: Model = "minilm",
    mask: Annotated[
        Path | None,
        typer.Option("--mask", help="Train the entries of this mask (--method talos)."),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            "--method",
            help="{methods}. By default talos with --mask, nonlinear without.",
        ),
    ] = None,
    rank: Annotated[
        int | None, typer.Option("--rank", help="Rank of l_lora's adapters, by default 16.")
    ] = None,
    density: Annotated[
        float | None,
        typer.Option(
            "--density",
            help="Fraction of the weights to train, by default 0.1: for lota of all weights, for "
            "random and magnitude of the maskable ones.",
        ),
    ] = None,
    sparse_lr: Annotated[
        float | None,
        typer.Option(
            "--sparse-lr",
            help="Peak learning rate of lota's second, sparse training, by default --lr.",
        ),
    ] = None,
    steps: Annotated[int, typer.Option("--steps", help="Optimizer steps.")] = 80,
    lr: Annotated[
        float | None,
        typer.Option("--lr", help="Peak learning rate. By default {rates}."),
    ] = None,
    json: Json = None,
    batch_size: Batch = 32,
    max_length: Length = None,
    seed: Seed = 0,
    force: Annotated[
        bool,
        typer.Option("--force", metavar="", help="Take a mask of other weights, too."),
    ] = False,
    overwrite: Overwrite = False,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            "--checkpoint",
            help="A folder for checkpoints, from which a training that was stopped goes on.",
        ),
    ] = None,
    every: Annotated[
        int | None,
        typer.Option(
            "--every",
            help="Steps from one checkpoint to the next, by default a tenth of --steps and at most "
            "100.",
        ),
    ] = None,
    keep: Annotated[
        int | None,
        typer.Option("--keep", help="How many of the newest checkpoints stay, by default 2."),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            metavar="",
            help="Go on from the newest checkpoint, or begin if there is none.",
        ),
    ] = False,
) -> None:
    """Fine-tune a model and write its task vector.

    With a mask only the selected weights are trained, and the vector holds only those.

    Other methods: nonlinear trains every weight. linearized trains every weight of the model's
    first-order expansion; evaluate its vectors with `talos eval --linearized`. l_lora trains
    linearized low-rank adapters on queries and values. lota trains the weights that change most
    under full fine-tuning; it takes the steps twice. attention_only trains the projections of
    attention. random and magnitude train as many weights as talos: random or the smallest ones.

    With --checkpoint a training that was stopped goes on: run the same command with --resume.

    torchrun starts it in several processes: each takes its share of every batch.
    """
    integer("--steps", steps, 1)
    integer("--batch-size", batch_size, 1)
    if batch_size % several():
        raise TalosValueError(
            f"--batch-size must be a multiple of the number of processes, {several()}, which "
            f"share each batch, got {batch_size}"
        )
    if max_length is not None:
        integer("--max-length", max_length, 3)
    if lr is not None:
        positive("--lr", lr)
    if mask is not None:
        check_input("--mask", mask)
    elif force:
        raise TalosValueError("--force must be left out without --mask, got it")
    check_output(out, overwrite)
    check_json(json, overwrite)
    given = {"--every": every, "--keep": keep, "--resume": resume or None}
    numbers = checked_numbers(checkpoint, given)
    method = checked_method(method, mask, rank, density, sparse_lr)
    import torch

    from talos.app.cli.loading import load_classifier, load_data
    from talos.app.cli.reading import show_data, show_other_tasks, tokens_for
    from talos.app.experiments.judging import training_batches
    from talos.app.provenance import made_with
    from talos.batches import digest_of
    from talos.distributed import rank as number_of_process
    from talos.distributed import world_size
    from talos.masks import Mask
    from talos.methods import METHODS, method_of
    from talos.names import match_tensors, named_parameters
    from talos.tensors import readable_size
    from talos.training import FineTuneStep, fine_tune
    from talos.training.checkpoints import check_folder, losses_in, steps_in

    options = {"lr": "--lr", "checkpoint": "--checkpoint", "resume": "--resume"}
    if checkpoint is not None:
        with as_options(options):
            check_folder(checkpoint, resume=resume)
    with on_interrupt(lambda: _kept(checkpoint, resume)), Bars() as bars:
        rate = lr if lr is not None else METHODS[method].usual_lr
        own = {"rank": rank, "density": density, "sparse_lr": sparse_lr}
        with as_options({"path": "--mask"}):
            selected = Mask.load(mask) if mask is not None else None
        chosen = method_of(
            method,
            selected,
            {key: value for key, value in own.items() if value is not None},
        )
        task = load_data(data)
        classifier = load_classifier(model, task)
        made_before: dict[Path, Mapping[str, Any]] = {}
        if mask is not None and selected is not None:
            with of_model(mask, selected.metadata, classifier.encoder.name):
                match_tensors(selected.shapes, named_parameters(classifier))
            if not force:
                _check_base(mask, selected, classifier)
            made_before = {mask: selected.metadata}
        tokens = tokens_for(task, classifier.encoder, max_length, made_before.values())
        show_data(task, classifier.encoder, tokens, made_before)
        show_other_tasks([task], made_before)
        batches = training_batches(
            task,
            classifier.encoder,
            count=steps * batch_size,
            batch_size=batch_size,
            max_length=tokens,
            seed=seed,
        )
        # A first batch that `_share` gives whole to each is meant.
        warnings.filterwarnings("ignore", "the first batch is the same on all")
        own_batches = [_share(each, number_of_process(), world_size()) for each in batches]
        torch.manual_seed(seed + number_of_process())  # dropout
        losses: list[float] = []

        def on_step(step: FineTuneStep) -> None:
            if resume and not losses and number_of_process() == 0:
                note(_begun(checkpoint, step.step - 1))
            losses.append(step.loss)
            bars.show(f"train {task.name}", step.step, step.steps, step.loss)

        reached = steps_in(checkpoint) if checkpoint is not None else []
        bars.show(f"train {task.name}", max(reached, default=0), steps * chosen.phases)
        about = made_with(task, classifier.encoder, tokens, seed=seed)
        with as_options({**options, "path": "--checkpoint"}):
            vector = fine_tune(
                classifier,
                own_batches,
                method=chosen,
                steps=steps,
                lr=rate,
                on_step=on_step,
                checkpoint=checkpoint,
                data=about | {"batch_size": batch_size, "batches": digest_of(batches)},
                **numbers,
            )
        if number_of_process() > 0:  # all have the same vector; one writes it
            return
        made = about | {"steps": steps, "lr": rate}
        vector = replace(vector, metadata=vector.metadata | made)
        vector.save(out)
    if checkpoint is not None:
        losses = losses_in(checkpoint)  # also of the steps before it was resumed
    print_line(
        stdout(json),
        f"{out}: {vector.mask.nnz:,} entries, {readable_size(out.stat().st_size)}; "
        f"loss {losses[0]:.3f} at the first step, {losses[-1]:.3f} at the last",
    )
    if (line := _did_not_help(losses, len(task.class_names))) is not None:
        note(f"warning: {line}; train with an --lr below {rate:g}, or with more --steps")
    write_record(
        json,
        "train",
        {
            "file": str(out),
            "bytes": out.stat().st_size,
            "entries": vector.mask.nnz,
            "losses": [finite(loss) for loss in losses],
            "metadata": vector.metadata,
        },
    )
    where = ("--linearized",) if method == "linearized" else ()
    words = ("--model", model, "--data", data, "--vector", out, "--scale", "grid", *where)
    next_step(command("eval", *words), merge_command(out, 0.5))


def _share(batch: dict[str, Any], number: int, processes: int) -> dict[str, Any]:
    """Return a process' rows of a batch; what cannot be shared evenly goes whole to each.

    So the mean over processes is that of the batch: the last batch of an epoch may have any size.
    """
    if len(batch["labels"]) % processes:
        return batch
    return {key: value.chunk(processes)[number] for key, value in batch.items()}


def _begun(checkpoint: Path | None, step: int) -> str:
    """Return where a training with --resume begins."""
    return f"{checkpoint}: " + (
        f"goes on after step {step}" if step else "no checkpoint, begins anew"
    )


def _kept(checkpoint: Path | None, resume: bool) -> str:
    """Return what a training that Ctrl-C stopped leaves."""
    if checkpoint is None:
        return "nothing was written"
    from talos.training.checkpoints import steps_in

    if not (steps := steps_in(checkpoint)):
        return "no checkpoint was written yet; a lower --every writes one sooner"
    again = "the same command" if resume else "the same command and --resume"
    return f"{checkpoint} has the checkpoint of step {steps[0]}; {again} goes on from there"


def _did_not_help(losses: list[float], classes: int) -> str | None:
    """Return a line if the last tenth of the losses is no better than the first, or than guessing.

    A loss that training blows up ends near that of guessing, which may be below the first one.
    """
    size = len(losses) // 10
    if size == 0:
        return None
    first, last, guess = fmean(losses[:size]), fmean(losses[-size:]), math.log(classes)
    if last < min(first, 0.95 * guess):
        return None
    return (
        f"the loss is {first:.3f} in the first steps and {last:.3f} in the last, and guessing has "
        f"{guess:.3f}"
    )


def _check_base(file: Path, mask: "Mask", classifier: "Classifier") -> None:
    """Refuse a mask that was calibrated on other weights, where its file tells them."""
    from talos.app.provenance import base_of

    if mask.metadata.get("base") not in (None, base_of(mask, classifier)):
        raise TalosValueError(
            f"--mask must be calibrated on the weights of --model {classifier.encoder.name}, got "
            f"{file} of other weights; calibrate again, or pass --force to train its entries here"
        )
