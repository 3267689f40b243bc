"""Damage a million files and load each: python -m benches.fuzz --inputs 1000000 --out DIR

Each case is a valid file that `benches.damage` changed, in memory (/dev/shm). A loader must load it
or raise one of the package's errors: no other error, no crash, no second, no memory beyond what
such a small file may take. A file whose checksums were not made again must load as it was, or not.
"""

import argparse
import contextlib
import io
import json
import os
import random
import resource
import shutil
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from benches import damage
from benches.damage import JSON, PLAIN, SAFETENSORS, TALOS, Damage, of_signed
from benches.measure import machine
from benches.results import add_result
from talos import Mask, Patch, TaskVector
from talos.app.cli import main as command
from talos.app.cli.recipes import read_recipe
from talos.app.models.folders import class_name
from talos.app.models.heads import HEAD_FILE, Head, load_heads, save_heads
from talos.app.report.results import _KEYS as KEYS
from talos.app.report.results import SCHEMA, SCHEMA_VERSION
from talos.app.report.runs import EVAL_SCHEMA, EVAL_SCHEMA_VERSION, load_runs
from talos.app.tasks.files import load_file, read_texts
from talos.errors import TalosError
from talos.files import Checkpoint
from talos.training import FineTuneStep, fine_tune

SLOW = ("talos inspect", "talos compare", "resume")  # milliseconds each: a quarter of the cases
CHUNK = 5_000  # cases of one child process
SECONDS, MEMORY = (
    1.0,
    64 << 20,
)  # the most a case may take, and all cases of a child above its start
SHAPES = {"full": (3,), "bits": (40,), "few": (80, 3), "none": (5,)}


@dataclass(frozen=True)
class Loader:
    """A loader and valid files for it.

    Attributes:
        files: the content of each file, by its place in a folder.
        damages: what is done to each of them.
        load: loads the folder.
        same: loaded files with checksums of their own must equal what was saved.
    """

    files: dict[str, bytes]
    damages: dict[str, tuple[Damage, ...]]
    load: Callable[[Path], object]
    same: bool = False


@dataclass
class Found:
    """What the cases of a loader came to."""

    inputs: int = 0
    loaded: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    faults: list[dict[str, Any]] = field(default_factory=list)
    slowest: float = 0.0


def vector() -> TaskVector:
    """Return a task vector with a tensor of every encoding."""
    generator = torch.Generator().manual_seed(0)
    dense = {
        name: torch.rand(shape, generator=generator) < density
        for (name, shape), density in zip(SHAPES.items(), (1.0, 0.3, 0.02, 0.0), strict=True)
    }
    mask = Mask.from_dense(dense, metadata={"density": 0.1, "samples": [1, 2], "params": "qk"})
    values = torch.randn(mask.nnz, generator=generator)
    about = {"sum": [{"scale": 0.5, "of": {"task": "a"}}, {"scale": 1.0, "of": {"task": "b"}}]}
    return TaskVector(mask, values, {"bits": "0123456789abcdef"}, about)


def loaders() -> dict[str, Loader]:
    """Return every loader of a file that a user may have from elsewhere."""
    whole = vector()
    masks, vectors = _bytes(whole.mask.save), _bytes(whole.save)
    positions = {"a": torch.tensor([0, 5]), "b": torch.tensor([2])}
    values = {"a": torch.tensor([1.0, -1.0]), "b": torch.tensor([2.0]).bfloat16()}
    patch = Patch({"a": (2, 3), "b": (3,)}, positions, values)
    words = ("cat", "dog")
    head = Head("pets", "zero_shot", words, words, 100.0, 48, "0" * 16, torch.randn(2, 4))
    tensors = {"q.weight": torch.randn(6, 4), "v.weight": torch.randn(3, 4).bfloat16()}
    shards = {f"{name[0]}.safetensors": {name: each} for name, each in tensors.items()}
    index = {"weight_map": {"q.weight": "q.safetensors", "v.weight": "v.safetensors"}}
    recipe = (
        b'method = "ties"\nvectors = ["a.safetensors", {file = "b.safetensors", scaling_coef = '
        b'0.5}]\noutputs = [{file = "c.safetensors", dtype = "float16"}]\n[settings]\ndensity = 0.1'
    )
    config = json.dumps({"architectures": ["BertModel"], "hidden_size": 4}).encode()
    run, study = (json.dumps(each()).encode() for each in (_evaluated, _experimented))
    rows = b"text,label,label_text\n" + b"".join(
        b'%b %d,%b,"a %b, or so"\n' % (w, i, w, w) for w in (b"cat", b"dog") for i in range(4)
    )
    lines = b"".join(
        json.dumps({"text": f"{w} {i}", "label": w}).encode() + b"\n"
        for w in ("cat", "dog")
        for i in range(4)
    )
    return {
        "Mask.load": _one(masks, Mask.load, TALOS, same=True),
        "TaskVector.load": _one(vectors, TaskVector.load, TALOS, same=True),
        "Patch.load": _one(_bytes(patch.save), Patch.load, TALOS, same=True),
        "talos inspect": _one(vectors, lambda file: _command("inspect", file), TALOS),
        "load_heads": Loader(
            {HEAD_FILE: _bytes(lambda path: save_heads(path, {"pets": head}))},
            {HEAD_FILE: TALOS},
            load_heads,
        ),
        "resume": _one(stopped(), resumed, (*TALOS, of_signed), "step-00000001.safetensors"),
        "Checkpoint": _one(
            safetensors.torch.save(tensors), lambda file: dict(Checkpoint(file)), SAFETENSORS
        ),
        "Checkpoint of shards": Loader(
            {name: safetensors.torch.save(each) for name, each in shards.items()}
            | {"model.safetensors.index.json": json.dumps(index).encode()},
            {"model.safetensors.index.json": JSON, "q.safetensors": SAFETENSORS},
            lambda folder: dict(Checkpoint(folder)),
        ),
        **{f"from_adapter, {kind}": each for kind, each in _adapters(tensors).items()},
        "Patch.decode": _decode(patch),
        "config.json": _one(config, lambda file: class_name(file.parent), JSON, "config.json"),
        "talos compare": Loader(
            {"a.json": run, "b.json": run},
            {"b.json": JSON},
            lambda folder: _command("compare", folder / "a.json", folder / "b.json"),
        ),
        "results of an experiment": _one(study, load_runs, JSON, "results.json"),
        "recipe in TOML": _one(recipe, read_recipe, PLAIN, "recipe.toml"),
        "data in CSV": _one(rows, load_file, PLAIN, "pets.csv"),
        "data in JSON lines": _one(lines, load_file, PLAIN, "pets.jsonl"),
        "texts in CSV": _one(rows, read_texts, PLAIN, "pets.csv"),
    }


def _bytes(save: Callable[[Path], object]) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder, "a"))
        return Path(folder, "a").read_bytes()


def _one(
    raw: bytes,
    load: Callable[[Path], object],
    damages: tuple[Damage, ...],
    name: str = "a.safetensors",
    *,
    same: bool = False,
) -> Loader:
    return Loader({name: raw}, {name: damages}, lambda folder: load(folder / name), same)


def _command(*words: object) -> int:
    """Run a command; an error is one line on stderr and exit code 2."""
    with contextlib.redirect_stderr(io.StringIO()) as told:
        status = command(list(map(str, words)))
    lines = [line for line in told.getvalue().splitlines() if line.startswith("error: ")]
    if status == 2 and len(lines) == 1:
        raise TalosError(lines[0])
    if status:
        raise RuntimeError(f"exit code {status}: {told.getvalue()}")
    return status


def _evaluated() -> dict[str, Any]:
    """Return what `talos eval --json` writes."""
    task = {"data": "pets.csv", "examples": 12, "fingerprint": "0" * 16, "max_length": 48}
    return {
        "schema": EVAL_SCHEMA,
        "schema_version": EVAL_SCHEMA_VERSION,
        "model": "minilm",
        "linearized": False,
        "tasks": {"pets": task},
        "vectors": [{"file": "a.safetensors"}],
        "scaling_coef": 0.5,
        "outcomes": {"pretrained": {"pets": "ff00"}, "edited": {"pets": "fff0"}},
    }


def _experimented() -> dict[str, Any]:
    """Return what of the results of an experiment is compared."""
    estimate = {"value": 0.5, "low": 0.4, "high": 0.6, "n": 9}
    added = {"tasks": {"pets": estimate}, "absolute": estimate, "normalised": estimate}
    run = {"model": "minilm", "row": "talos", "seed": 0, "addition": added | {"scaling_coef": 0.5}}
    return {key: {} for key in KEYS} | {
        "schema": SCHEMA,
        "schema_version": SCHEMA_VERSION,
        "models": [{"name": "minilm", "source": "minilm"}],
        "runs": [run, run | {"row": "nonlinear"}],
    }


def _adapters(base: dict[str, torch.Tensor]) -> dict[str, Loader]:
    """Return adapters of each kind of PEFT that is read."""
    lora = {"lora_A.weight": torch.randn(2, 4), "lora_B.weight": torch.randn(6, 2)}
    shira = {"shira_weight": torch.randn(2), "shira_indices": torch.tensor([[0, 5], [1, 3]])}
    tuned = {
        "supertuning_values": torch.randn(2),
        "supertuning_indices": torch.tensor([3, 23], dtype=torch.int32),
    }
    configs = {
        "LORA": {"r": 2, "lora_alpha": 4, "alpha_pattern": {"q": 8}, "target_modules": ["q"]},
        "SHIRA": {"r": 1, "target_modules": ["q"], "save_precomputed_indices": True},
        "SUPERTUNING": {"sparsity": 0.9, "target_modules": ["q"]},
    }
    found = {}
    for (kind, config), own in zip(configs.items(), (lora, shira, tuned), strict=True):
        weights = {f"base_model.model.q.{name}": each for name, each in own.items()}
        files = {
            "adapter_config.json": json.dumps({"peft_type": kind, **config}).encode(),
            "adapter_model.safetensors": safetensors.torch.save(weights),
        }
        found[kind] = Loader(
            files,
            {"adapter_config.json": JSON, "adapter_model.safetensors": SAFETENSORS},
            lambda folder: TaskVector.from_adapter(folder, base),
        )
    return found


def _train(folder: Path, stop: bool) -> TaskVector:
    """Train a small model for two steps, from the newest checkpoint, or stop after the first."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Dropout(0.1), torch.nn.Linear(4, 2))
    mask = Mask.from_dense({"0.weight": torch.eye(4, 3) > 0, "2.bias": torch.ones(2) > 0})
    batches = [(torch.randn(2, 3), torch.tensor([0, 1])) for _ in range(3)]

    def interrupt(event: FineTuneStep) -> None:
        if event.step == 2:  # a step's checkpoint is written after this call
            raise InterruptedError

    loop = {"checkpoint": folder, "every": 1, "keep": 1, "resume": True}
    return fine_tune(model, batches, mask, steps=2, on_step=interrupt if stop else None, **loop)


def stopped() -> bytes:
    """Return the checkpoint of the first step of two."""
    with tempfile.TemporaryDirectory() as folder:
        with contextlib.suppress(InterruptedError):
            _train(Path(folder), stop=True)
        return (Path(folder) / "step-00000001.safetensors").read_bytes()


def resumed(file: Path) -> TaskVector:
    """Take the second step, in another folder."""
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        shutil.copy(file, folder)
        return _train(Path(folder), stop=False)


def _decode(patch: Patch) -> Loader:
    """Return the buffers of a coded patch as files of bytes."""
    mask = Mask.from_dense({"a": torch.ones(2, 3) > 0, "b": torch.tensor([False, True, True])})
    buffers = patch.encode(mask)

    def load(folder: Path) -> object:
        found = {
            name: torch.frombuffer(
                bytearray((folder / name).read_bytes() or b"\0"), dtype=torch.uint8
            )
            for name in buffers
        }
        return Patch.decode(found, mask)

    files = {name: each.numpy().tobytes() for name, each in buffers.items()}
    return Loader(files, dict.fromkeys(files, PLAIN), load)


def damaged(draw: random.Random, loader: Loader) -> tuple[str, bytes, bool]:
    """Return one file of a loader, damaged, and whether its checksums were made again."""
    name = draw.choice(list(loader.damages))
    raw, again = loader.files[name], False
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        kind = draw.choice(loader.damages[name])
        again |= kind is damage.of_signed
        with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError, AttributeError):
            raw = kind(draw, raw or b"\0")  # of a file that is damaged already a part may be gone
    return name, raw, again


def write(loader: Loader, folder: Path) -> None:
    """Write a loader's valid files."""
    for name, raw in loader.files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(raw)


def try_one(loader: Loader, folder: Path, draw: random.Random, found: Found, valid: object) -> None:
    """Load one damaged file and put the right one back.

    Args:
        loader: whose files lie in `folder`.
        folder: of the files.
        draw: decides the damage.
        found: takes the outcome.
        valid: what the undamaged files hold.
    """
    name, raw, again = damaged(draw, loader)
    (folder / name).write_bytes(raw)
    fault, start = "", time.process_time()
    try:
        content = loader.load(folder)
        found.loaded += 1
        if loader.same and not again and content != valid:
            fault = "it loaded as something else"
    except TalosError as error:
        found.refused[type(error).__name__] += 1
        if not str(error):
            fault = "an error without a message"
    except Exception as error:
        fault = f"{type(error).__name__}: {error!s:.200}"
    seconds = time.process_time() - start
    found.inputs += 1
    found.slowest = max(found.slowest, seconds)
    if seconds > SECONDS:
        fault = fault or f"{seconds:.1f} seconds"
    if fault:
        found.faults.append({"fault": fault, "file": name, "content": raw[:4000].hex()})
    (folder / name).write_bytes(loader.files[name])


def run(loader: Loader, name: str, cases: range, seed: int) -> dict[str, Any]:
    """Try cases in a process of their own; a crash of it is a fault."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            with os.fdopen(writer, "w") as out:
                json.dump(_run(loader, name, cases, seed), out)
            os._exit(0)
        finally:  # whatever it was, the parent's code must not go on here
            os._exit(1)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    if status or not text:
        fault = f"the process ended with status {status} in cases {cases} of seed {seed}"
        return {"inputs": len(cases), "loaded": 0, "refused": {}, "faults": [{"fault": fault}]} | {
            "slowest": 0.0,
            "memory": 0,
        }
    return dict(json.loads(text))


def _run(loader: Loader, name: str, cases: range, seed: int) -> dict[str, Any]:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    found = Found()
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else None) as place:
        folder = Path(place)
        write(loader, folder)
        valid = loader.load(folder)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        limit = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (limit + (1 << 29), resource.RLIM_INFINITY))
        with contextlib.redirect_stdout(io.StringIO()):
            for case in cases:
                draw = random.Random(f"{name} {seed} {case}")
                try_one(loader, folder, draw, found, valid)
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    if memory > MEMORY:
        found.faults.append({"fault": f"{memory} bytes more in cases {cases} of seed {seed}"})
    return {**vars(found), "memory": memory}


def main(argv: Sequence[str] | None = None) -> int:
    """Return 0 if no case was a fault."""
    parser = argparse.ArgumentParser(prog="python -m benches.fuzz", description=__doc__)
    parser.add_argument("--inputs", type=int, default=20_000, help="for all loaders together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", action="append", help="a loader's name; leave out the others")
    parser.add_argument("--out", type=Path, metavar="DIR", help="for fuzz.json")
    options = parser.parse_args(argv)
    every = {name: each for name, each in loaders().items() if name in (options.only or [name])}
    shares = {name: 1 if name in SLOW else 4 for name in every}
    faults = 0
    for name, loader in every.items():
        each = -(-options.inputs * shares[name] // sum(shares.values()))
        total: dict[str, Any] = {"inputs": 0, "loaded": 0, "slowest": 0.0, "memory": 0}
        refused: Counter[str] = Counter()
        found: list[dict[str, Any]] = []
        for start in range(0, each, CHUNK):
            own = run(loader, name, range(start, min(start + CHUNK, each)), options.seed)
            for key in ("inputs", "loaded"):
                total[key] += own[key]
            for key in ("slowest", "memory"):
                total[key] = max(total[key], own[key])
            refused.update(own["refused"])
            found += own["faults"]
        faults += len(found)
        print(f"{name}: {total} {dict(refused)}, {len(found)} faults", flush=True)
        for kind, count in Counter(each["fault"] for each in found).most_common(10):
            first = next(one for one in found if one["fault"] == kind)
            print(f"  {count} x {kind}: {first.get('file')} {first.get('content', '')[:0]}")
        if options.out:
            about = {"op": "fuzz", "shape": name, "form": f"seed {options.seed}"}
            add_result(
                options.out,
                {**about, **total, "refused": dict(refused), "faults": found[:10], **machine()},
            )
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main())
