"""`talos bench`: what an iteration costs, by method, beside the paper's numbers."""

import os
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from talos.app.cli.console import Bars, next_step, on_interrupt, print_line, stdout
from talos.app.cli.options import Overwrite, check_choice
from talos.errors import TalosOSError, TalosRuntimeError
from talos.options import integer

__all__ = ["EXAMPLES", "bench"]

EXAMPLES = (
    "talos bench --out bench --quick",
    "talos bench --out bench --model vit-b-32 --batch 16 --dtype bf16",
    "talos bench --out bench --model t5-large --layers 2 --tokens 64 --batch 4",
)
_FILES = ("costs.json", "time.svg", "memory.svg")
_QUICK_LAYERS, _QUICK_BATCH = 2, 2


def bench(
    out: Annotated[Path, typer.Option("--out", help="The folder to write; made when missing.")],
    model: Annotated[
        str,
        typer.Option(
            "--model", help="vit-b-32, vit-l-14, t5-large or minilm: their shapes, random weights."
        ),
    ] = "vit-b-32",
    batch: Annotated[
        int | None,
        typer.Option("--batch", help="Images or texts; by default 128 on a GPU, 16 on a CPU."),
    ] = None,
    tokens: Annotated[
        int | None, typer.Option("--tokens", help="Of a text; images take none.")
    ] = None,
    layers: Annotated[
        int | None, typer.Option("--layers", help="Of each stack; by default all.")
    ] = None,
    dtype: Annotated[
        str, typer.Option("--dtype", help="fp32, or bf16: fp32 weights under autocast.")
    ] = "fp32",
    rounds: Annotated[
        int, typer.Option("--rounds", help="How often each method has its turn.")
    ] = 3,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Under torch.compile too; minutes more on a CPU.")
    ] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="2 layers, a batch of 2, one round.")
    ] = False,
    overwrite: Overwrite = False,
) -> None:
    """Measure time, memory and launches of an iteration of each method.

    Non-linear, linearized, L-LoRA, LoTA and TaLoS train the same model of random weights on the
    same batch, in turn; each is checked to do what it claims. Times are also given as ratios to
    non-linear fine-tuning, beside the paper's: machines differ, ratios less so. Takes some minutes
    on two cores with a whole model; memory is that of torch's allocator.

    Writes costs.json, time.svg and memory.svg.
    """
    import torch

    from talos.app.costs import COMPILED, FORMS, ITERATIONS, MODELS, make_workload, measure
    from talos.app.costs.figure import memory_bars, time_bars
    from talos.app.costs.results import results_of, save_results
    from talos.app.costs.workload import check_sizes
    from talos.app.demo.machine import default_device

    device = default_device()
    on_gpu = device.type == "cuda"
    if quick:
        batch, layers, rounds = batch or _QUICK_BATCH, layers or _QUICK_LAYERS, 1
    if batch is None:
        batch = 128 if on_gpu else 16
    check_choice("--model", model, MODELS)
    check_choice("--dtype", dtype, ("fp32", "bf16"))
    integer("--rounds", rounds, 1)
    check_sizes(model, batch_size=batch, tokens=tokens, layers=layers)
    _prepare(out, overwrite)
    _check_installed(model)
    workload = make_workload(
        model,
        batch_size=batch,
        tokens=tokens,
        layers=layers,
        dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[dtype],
        device=device,
    )
    wanted = [*FORMS, *(COMPILED if compiled else ())]
    left_out = {form.name: why for form in wanted if (why := form.missing(workload))}
    with on_interrupt("nothing was written"), Bars() as bars:
        costs = measure(
            workload,
            [form for form in wanted if form.name not in left_out],
            rounds=rounds,
            on_progress=bars.show,
        )
    measured = {cost.form for cost in costs} | left_out.keys()
    left_out |= {each.name: "it ran out of memory" for each in wanted if each.name not in measured}
    settings = {
        "model": model,
        "batch": batch,
        "tokens": tokens,
        "layers": layers,
        "dtype": dtype,
        "rounds": rounds,
        "iterations": ITERATIONS[device.type],
        "trainable": sum(param.numel() for param in workload.model.parameters()),
        "selected": workload.mask.nnz,
    }
    results = results_of(costs, settings, left_out)
    figures = {"time.svg": time_bars(results), "memory.svg": memory_bars(results)}
    out.mkdir(parents=True, exist_ok=True)
    save_results(results, out / "costs.json")
    for name, svg in figures.items():
        (out / name).write_text(svg, encoding="utf-8")
    _show(results, left_out)
    next_step(
        stdout(),
        f"open {out / 'time.svg'} and {out / 'memory.svg'} in a browser",
        "talos demo --out demo --quick",
    )


def _prepare(out: Path, overwrite: bool) -> None:
    """Refuses a folder that cannot be written, before minutes of work."""
    if out.exists() and not out.is_dir():
        raise TalosOSError(f"--out must be a folder, got the file {out}")
    there = [name for name in _FILES if (out / name).exists()]
    if there and not overwrite:
        raise TalosOSError(
            f"--out must not hold {', '.join(there)}, got {out}; pass --overwrite to replace them"
        )
    above = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    if not os.access(above, os.W_OK):
        raise TalosOSError(f"--out must lie in a folder that can be written, got {out}")


def _check_installed(model: str) -> None:
    """Refuses to start what could not end."""
    import importlib.util

    clip = model.startswith("vit")
    wanted = {"matplotlib": "report", **({"open_clip": "clip"} if clip else {"transformers": "hf"})}
    for name, extra in wanted.items():
        if importlib.util.find_spec(name) is None:
            raise TalosRuntimeError(
                f"the bench must have {name}, got no such module; "
                f"pip install 'talos-sparse[{extra}]'"
            )


def _show(results: dict[str, Any], left_out: dict[str, str]) -> None:
    from talos.app.costs.results import table_rows

    console = stdout()
    settings, forms = results["settings"], results["forms"]
    shown = (f"{key} {settings[key]}" for key in ("batch", "dtype"))
    console.print(f"\n[bold]an iteration of {settings['model']}, {', '.join(shown)}[/bold]")
    rows = table_rows(forms, settings["model"])
    first: tuple[str, ...]
    second: tuple[str, ...]
    first = ("forward-\nbackward s", "optimizer\ns", "total\ns", "f-b\nx", "paper\nf-b x")
    first += ("total\nx", "paper\ntotal x", "peak\nMB", "peak\nx", "paper\npeak x")
    second = ("weights\nMB", "gradients\nMB", "state\nMB", "activations\nMB", "launches")
    second += ("step\nGB/s", "of copy")
    console.print(_table(first, [row[:11] for row in rows]))
    console.print("\n[bold]its memory and its step[/bold]")
    console.print(_table(second, [(row[0], *row[11:]) for row in rows]))
    print_line(console, "x: over non-linear fine-tuning; paper: the same of its authors' machine")
    if settings["rounds"] == 1:
        print_line(console, "one round only: to compare times, run more rounds")
    for name, why in left_out.items():
        print_line(console, f"left out: {name} ({why})")


def _table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> Table:
    table = Table(box=None, header_style="bold", padding=(0, 1))
    table.add_column("method")
    for column in columns:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*row, style="bold" if row[0].startswith("TaLoS") else None)
    return table
