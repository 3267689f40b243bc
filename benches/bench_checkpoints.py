"""A vector from two checkpoints, and a checkpoint from a vector, beside loading them whole.

The checkpoints are bfloat16 in shards, SHARDS x TENSORS weights of 4096 x 2048; a tenth of the
entries differs. Each form runs in a process of its own, whose peak of resident memory is read from
the system. Both forms must give the same bits.
"""

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benches import measure
from benches.results import OURS, Record
from talos import TaskVector

SHARDS, TENSORS, SHAPE, DENSITY = 4, 16, (4096, 2048), 0.1
WHOLE = "loaded whole"


def save_checkpoints(folder: Path) -> None:
    """Write base and tuned."""
    for kind in ("base", "tuned"):
        (folder / kind).mkdir()
        placed = {}
        for shard in range(SHARDS):
            torch.manual_seed(shard)
            names = [f"layers.{shard * TENSORS + i}.q_proj.weight" for i in range(TENSORS)]
            tensors = {name: (torch.randn(SHAPE) * 0.02).bfloat16() for name in names}
            if kind == "tuned":
                for each in tensors.values():
                    each[torch.rand(SHAPE) < DENSITY] += 0.01
            file = f"model-{shard + 1:05}-of-{SHARDS:05}.safetensors"
            save_file(tensors, folder / kind / file, {"format": "pt"})
            placed |= dict.fromkeys(names, file)
        index = {"metadata": {}, "weight_map": placed}
        (folder / kind / "model.safetensors.index.json").write_text(json.dumps(index))


def whole(folder: Path) -> dict[str, dict[str, Tensor]]:
    return {path.name: load_file(path) for path in sorted(folder.glob("*.safetensors"))}


def extract(folder: Path, form: str) -> Callable[[], str]:
    """Return the hash of the changed positions and their float32 differences, by name."""
    if form == OURS:
        vector = TaskVector.from_models(folder / "base", folder / "tuned", "changed")
        vector.save(folder / "vector.safetensors")
        names = sorted(vector.mask.names)
        dense = vector.to_dense
    else:
        base, tuned = whole(folder / "base"), whole(folder / "tuned")
        deltas = {n: tuned[f][n].float() - base[f][n].float() for f in base for n in base[f]}
        names, dense = sorted(deltas), deltas.__getitem__

    def digest() -> str:
        found = hashlib.sha256()
        for name in names:
            found.update(dense(name).numpy().data)
        return found.hexdigest()

    return digest


def export(folder: Path, form: str) -> Callable[[], str]:
    """Return the hash of the files."""
    vector, out = TaskVector.load(folder / "vector.safetensors"), folder / f"out-{form}"
    if form == OURS:
        vector.export(folder / "base", out)
    else:
        out.mkdir()
        for file, tensors in whole(folder / "base").items():
            for name, each in tensors.items():
                each.copy_(each.float() + vector.to_dense(name))
            save_file(tensors, out / file, {"format": "pt"})

    def digest() -> str:
        found = hashlib.sha256()
        for path in sorted(out.glob("*.safetensors")):
            with path.open("rb") as file:
                found.update(hashlib.file_digest(file, "sha256").digest())
        return found.hexdigest()

    return digest


def run(op: str, form: str, folder: Path) -> dict[str, object]:
    """Run one form in this process."""
    found: dict[str, Any] = {}

    def work() -> None:
        start = measure.clock()
        digest = {"extract": extract, "export": export}[op](folder, form)
        found.update(seconds=measure.clock() - start, digest=digest)

    peak = measure.resident_peak(work)
    return {"seconds": found["seconds"], "peak": peak, "digest": found["digest"]()}


@pytest.mark.skipif(not measure.RESIDENT_PEAK.exists(), reason="reads the peak from /proc")
def bench_checkpoints(tmp_path: Path, keep: Callable[[Record], object]) -> None:
    save_checkpoints(tmp_path)
    nbytes = SHARDS * TENSORS * 2 * SHAPE[0] * SHAPE[1]
    for op, moved in (("extract", 2 * nbytes), ("export", 2 * nbytes)):
        digests = set()
        for form in (OURS, WHOLE):
            command = [sys.executable, "-m", "benches.bench_checkpoints", op, form, str(tmp_path)]
            done = subprocess.run(command, cwd=measure.ROOT, capture_output=True, check=True)
            found = json.loads(done.stdout)
            digests.add(found["digest"])
            keep(
                Record(
                    op="checkpoints",
                    shape=f"{op}, bf16, {nbytes >> 20} MiB",
                    form=form,
                    seconds=found["seconds"],
                    spread=0.0,
                    bytes_moved=moved,
                    peak_bytes=found["peak"],
                    comparable=op == "export",  # ours also encodes, hashes the base and saves
                )
            )
        assert len(digests) == 1, "the forms differ"


if __name__ == "__main__":
    print(json.dumps(run(sys.argv[1], sys.argv[2], Path(sys.argv[3]))))
