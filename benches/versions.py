"""Two checkouts of the project in turn: how a change affects the times of its main works.

    python -m benches.versions OTHER --out FOLDER

Each turn is a process of its own in each checkout, so that whatever slows the machine slows both.
Both must be built (`setup.py build_ext --inplace`). Only public names that both have are used.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

from benches import measure
from benches.results import write_json

TURNS = 7
CALLS = 7
WORKS = (
    *("step", "step, compact", "clip", "score", "score six batches", "threshold"),
    *("apply and take off", "swap"),
)

# Runs in either checkout.
WORKER = """
import json, sys, time
from pathlib import Path
import torch, talos
from torch import nn
from talos_kernels import select_threshold

assert Path(talos.__file__).is_relative_to(Path.cwd()), talos.__file__
torch.manual_seed(0)
calls = int(sys.argv[1])
names = [f"{i}.weight" for i in range(12)]
model = nn.Sequential(*(nn.Linear(768, 1536, bias=False) for _ in names))
mask = talos.Mask.from_dense({name: torch.rand(1536, 768) < 0.6 for name in names})

def trained(compact):
    optimizer = talos.SparseAdam(model, mask, lr=1e-3)
    if compact:
        optimizer.compact_gradients()
    for parameter in model.parameters():
        parameter.grad = None
        (parameter * torch.randn_like(parameter)).sum().backward()
    return optimizer

def timed(work):
    work()
    seconds = []
    for _ in range(calls):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return seconds

found = {}
optimizer = trained(False)
found["step"] = timed(optimizer.step)
found["clip"] = timed(lambda: optimizer.clip_grad_norm_(1e9))
optimizer.release()
optimizer = trained(True)
found["step, compact"] = timed(optimizer.step)
optimizer.release()
for parameter in model.parameters():
    parameter.grad = None
layer = nn.TransformerEncoderLayer(256, 4, 1024, batch_first=True)
tower = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False).eval()
batch = torch.randn(8, 64, 256)
logits = lambda model, batch: model(batch).mean(1)
found["score"] = timed(lambda: talos.fisher_diag(tower, [batch], logits_fn=logits))
calls = 2
found["score six batches"] = timed(
    lambda: talos.fisher_diag(tower, [batch] * 6, logits_fn=logits)
)
calls = int(sys.argv[1])
scores = [torch.rand(1536, 768).square() for _ in names]
count = sum(each.numel() for each in scores) // 10
found["threshold"] = timed(lambda: select_threshold(scores, count))
vector = talos.TaskVector(mask, torch.randn(mask.nnz))

def edit():
    with vector.applied(model, 0.5):
        pass

found["apply and take off"] = timed(edit)
other = talos.TaskVector(mask, torch.randn(mask.nnz))
with talos.ResidentVectors(model, {"one": vector, "other": other}, force=True) as resident:

    def swap():
        resident.swap("one")
        resident.swap("other")

    found["swap"] = timed(swap)
print(json.dumps(found))
"""


def turn(checkout: Path) -> dict[str, list[float]]:
    command = [sys.executable, "-c", WORKER, str(CALLS)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # threads would wait for other processes
    done = subprocess.run(
        command, cwd=checkout, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{checkout}: {done.stderr[-2000:]}")
    found: dict[str, list[float]] = json.loads(done.stdout.splitlines()[-1])
    return found


def commit_of(checkout: Path) -> str:
    command = ["git", "rev-parse", "HEAD"]
    done = subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def main(show: Callable[[str], object] = print) -> None:
    parser = argparse.ArgumentParser(prog="python -m benches.versions")
    parser.add_argument("other", type=Path, help="a checkout of the version before, built")
    parser.add_argument("--out", type=Path, help="folder for versions.json")
    parser.add_argument("--turns", type=int, default=TURNS)
    options = parser.parse_args()
    checkouts = {"before": options.other.resolve(), "after": measure.ROOT}
    times: dict[str, dict[str, list[float]]] = {name: {} for name in checkouts}
    start = time.perf_counter()
    for _ in range(options.turns):
        for name, checkout in checkouts.items():
            for work, seconds in turn(checkout).items():
                times[name].setdefault(work, []).append(median(seconds))
    records = []
    show(f"| work | before, ms | after, ms | after / before | ratios of the turns |\n|{'---|' * 5}")
    for work in WORKS:
        before, after = times["before"][work], times["after"][work]
        ratios = sorted(new / old for old, new in zip(before, after, strict=True))
        record = {
            "work": work,
            "before": median(before),
            "after": median(after),
            "ratio": median(ratios),
            "ratios": ratios,
        }
        records.append(record)
        show(
            f"| {work} | {1e3 * median(before):.2f} | {1e3 * median(after):.2f} | "
            f"{median(ratios):.2f} | {ratios[0]:.2f} to {ratios[-1]:.2f} |"
        )
    show(f"{options.turns} turns in {time.perf_counter() - start:.0f} s")
    if options.out is not None:
        about = measure.machine() | {name: commit_of(each) for name, each in checkouts.items()}
        write_json(options.out / "versions.json", {"about": about, "works": records})


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
