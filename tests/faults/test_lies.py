"""Files whose checksums fit, but whose parts do not: refused in words, with the file named."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benches.damage import parts, signed
from benches.fuzz import resumed, stopped
from talos.errors import TalosValueError

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
