"""Files whose checksums fit, but whose parts do not: refused in words, with the file named."""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benches.damage import parts, signed
from benches.fuzz import resumed, stopped
from talos.errors import TalosValueError
from talos.masks import Mask


def claims(*entries: tuple[str, int, int]) -> bytes:
    """A mask's file without buffers: encoding, entries and selected ones of each tensor."""
    tensors = [
        {"name": str(i), "shape": [size], "encoding": encoding, "nnz": nnz}
        for i, (encoding, size, nnz) in enumerate(entries)
    ]
    about = {"version": 2, "kind": "mask", "content": {"tensors": tensors, "made": {}}}
    return signed({}, b"", about)


def most_kib() -> int:
    """The most memory that this process has had."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize(
    "entries",
    [
        [("u16", 2**36, 0)],
        [("u16", 2**30, 0)] * 64,
        [("u16", 2**36, 2**36)],
        [("bitmap", 2**40, 2**39)],
        [("bitmap", 2**62, 2**61)],
        [("full", 2**62, 2**62)],
        [("full", 2**36, 0)],
    ],
    ids=str,
)
def test_a_small_file_takes_little_memory_whatever_it_claims(
    entries: list[tuple[str, int, int]], tmp_path: Path
) -> None:
    (tmp_path / "a").write_bytes(claims(("full", 3, 3)))
    Mask.load(tmp_path / "a")
    (tmp_path / "a").write_bytes(claims(*entries))
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    before = most_kib()
    with contextlib.suppress(TalosValueError):
        Mask.load(tmp_path / "a")
    assert most_kib() - before < 16 * 1024


NAME = "step-00000001.safetensors"
Change = Callable[[dict[str, Any], dict[str, Any]], object]


def forged(change: Change) -> bytes:
    """A checkpoint after a change of its tensors' entries and its content, signed again."""
    header, data = parts(stopped())
    entries = json.loads(header)
    about = json.loads(entries.pop("__metadata__")["talos"])
    change(entries, about["content"])
    return signed(entries, data, about)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t, c: c.update(orders=[]), f"{NAME}: not a valid checkpoint, got .*no place"),
        (lambda t, c: c.update(orders={"a": 1}), f"{NAME}: not a valid checkpoint"),
        (lambda t, c: c["orders"][0].pop("taken"), f"{NAME}: not a valid checkpoint"),
        (lambda t, c: c["orders"][0].update(taken=-1), f"{NAME}: not a valid .*the place"),
        (lambda t, c: c["orders"][0].update(taken=1.5), f"{NAME}: not a valid checkpoint"),
        (lambda t, c: c["orders"][0].update(epoch=2**64), f"{NAME}: not a valid .*the place"),
        (lambda t, c: c["orders"][0].update(taken=99), "batches must be those of the checkpoint"),
        (lambda t, c: c.update(step=2), f"{NAME}: not a valid checkpoint"),
        (lambda t, c: t["losses"].update(shape=[1, 1]), f"{NAME}: not a valid checkpoint"),
        (
            lambda t, c: t["order/0/now/torch"].update(dtype="I8"),
            "states must be those of random_states, got others",
        ),
    ],
)
def test_a_checkpoint_that_lies_is_refused(tmp_path: Path, change: Change, match: str) -> None:
    (tmp_path / NAME).write_bytes(stopped())
    resumed(tmp_path / NAME)
    (tmp_path / NAME).write_bytes(forged(change))
    with pytest.raises(TalosValueError, match=match):
        resumed(tmp_path / NAME)
