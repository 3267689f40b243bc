"""Checkpoints of a training: one file for each, in a folder of their own.

A file holds all that a training needs to go on as if it had never stopped: what is trained, with
its exact bits, the optimizer's state, buffers that moved, the random number generators, the place
in the data and the losses so far. Beside them it has the settings and the fingerprints of the
initial weights, which a training that resumes must share.

All ranks of torch.distributed call these functions; rank 0 writes. What belongs to one rank, the
generators and the place in the data, is in the file once for each.
"""

import contextlib
import operator
import os
import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from talos.distributed import errors_on_all_ranks, is_sharded, rank
from talos.errors import TalosError, TalosOSError, TalosTypeError, TalosValueError
from talos.files import load_file, save_file
from talos.files.atomic import sweep
from talos.methods import Phase
from talos.names import named_buffers, named_parameters
from talos.options import integer
from talos.task_vectors.fingerprints import fingerprint
from talos.tensors import equal_bits
from talos.training.order import Order, under

__all__ = ["Checkpoints", "check_folder", "losses_in", "steps_in"]

_NAME = re.compile(r"step-(\d{8,})\.safetensors")
_KIND = "checkpoint"


class Checkpoints:
    """The checkpoints of one training.

    Args:
        folder: where they lie; the first checkpoint makes it.
        model: as it is before the training.
        settings: what a training that resumes must share, as texts by name.
        every: steps from one checkpoint to the next.
        keep: how many of the newest stay.
        resume: go on from the newest that is intact, if there is one.

    Attributes:
        step: the step that the training has reached.
        losses: of the steps until there.

    Raises:
        TalosTypeError: `folder` is no path.
        TalosValueError: a number is out of range; or the checkpoint found belongs to a training
            with other settings or initial weights; or none of those that are there is intact; or a
            parameter is sharded.
        TalosOSError: the folder cannot be written; or it holds checkpoints and `resume` is False.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        model: nn.Module,
        settings: Mapping[str, str],
        *,
        every: int,
        keep: int,
        resume: bool,
    ) -> None:
        if not isinstance(folder, str | os.PathLike):
            raise TalosTypeError(
                f"checkpoint must be the path of a folder, got {type(folder).__name__}"
            )
        self.folder, self._model, self._settings = Path(folder), model, dict(settings)
        self.every, self.keep = integer("every", every, 1), integer("keep", keep, 1)
        params = named_parameters(model)
        if sharded := [name for name, param in params.items() if is_sharded(param)]:
            raise TalosValueError(
                f"checkpoint must be None with sharded parameters, got {len(sharded)} of them; "
                "save and load with torch.distributed.checkpoint in a loop of your own"
            )
        self._base = {name: fingerprint(param) for name, param in params.items()}
        self._buffers = {n: each.detach().clone() for n, each in named_buffers(model).items()}
        self.step = 0
        self.losses: list[float] = []
        self._found: tuple[dict[str, Tensor], dict[str, Any]] | None = None
        with errors_on_all_ranks() as newest:
            if rank() == 0:
                check_folder(self.folder, resume=resume)
                newest += self._newest() if resume else []
        with errors_on_all_ranks():
            for step in newest:
                self._read(step)

    def _newest(self) -> list[int]:
        """Return the step of the newest checkpoint that is intact; []: there is none yet."""
        steps = steps_in(self.folder)
        for step in steps:
            try:
                self._found = load_file(_path(self.folder, step), _KIND, finite=False)
            except TalosValueError as error:
                warnings.warn(f"a checkpoint was passed over: {error}", stacklevel=6)
                continue
            return [step]
        if steps:
            raise TalosValueError(
                f"resume must find an intact checkpoint, got {len(steps)} damaged ones in "
                f"{self.folder}; begin anew in another folder"
            )
        return []

    def _read(self, step: int) -> None:
        """Read a checkpoint and refuse one of another training."""
        path = _path(self.folder, step)
        if self._found is None:
            self._found = load_file(path, _KIND, finite=False)
        tensors, content = self._found
        there, base = content.get("settings"), content.get("base")
        if (
            content.get("step") != step
            or not (isinstance(there, dict) and isinstance(base, dict))
            or not (isinstance(content.get("orders"), list) and "losses" in tensors)
        ):
            raise TalosValueError(f"{path}: not a valid checkpoint; begin anew in another folder")
        differ = [
            f"{name}={self._settings.get(name, 'none')} (there {there.get(name, 'none')})"
            for name in {**self._settings, **there}
            if self._settings.get(name) != there.get(name)
        ]
        if differ:
            raise TalosValueError(
                f"resume must go on with the settings of {path}, got {', '.join(differ)}; pass "
                "those, or begin anew in another folder"
            )
        names = [n for n in {**self._base, **base} if self._base.get(n) != base.get(n)]
        if names:
            raise TalosValueError(
                f"model must have the weights with which {path} began, got other ones in "
                f"{', '.join(names[:5])}; load the base again"
            )
        with _understood(path):
            self.step, self.losses = step, [float(each) for each in tensors["losses"].tolist()]
            for place in content["orders"]:
                if not all(0 <= operator.index(place[key]) < 1 << 63 for key in ("epoch", "taken")):
                    raise ValueError(f"the place {place} in the data")
            if not content["orders"]:
                raise ValueError("no place in the data")

    def resumed(self, phase: Phase) -> Phase:
        """Return the phase that was reached, given the first; the model's buffers go there, too."""
        if self._found is None:
            return phase
        tensors, _ = self._found
        with _understood(_path(self.folder, self.step)):
            phase = phase.resumed(under("phase/", tensors))
            own = named_buffers(self._model)
            with torch.no_grad():
                for name, saved in under("buffers/", tensors).items():
                    own[name].copy_(saved)
        return phase

    def go_to(self, order: Order) -> bool:
        """Let the data go on where they were, and the generators too; False: it is the start."""
        if self._found is None:
            return False
        tensors, content = self._found
        self._found = None  # everything has been read
        places = content["orders"]
        # A rank more than there were has the data's place of rank 0, and generators of its own.
        own = rank() if rank() < len(places) else 0
        order.go_to(places[own], under(f"order/{own}/", tensors), draws=own == rank())
        return True

    def save(self, phase: Phase, order: Order, step: int, loss: float, last: bool) -> None:
        """Note a step, and write a checkpoint if it is time; the last step is always written.

        Raises:
            TalosOSError: it cannot be written; the older ones stay as they were.
        """
        self.losses.append(loss)
        if step % self.every and not last:
            return
        with errors_on_all_ranks() as orders:
            orders.append(order.state())
        state = phase.state()  # of all ranks: it may be gathered
        with errors_on_all_ranks():
            if rank() == 0:
                self._write(step, state, orders)

    def _write(self, step: int, state: dict[str, Tensor], orders: list[Any]) -> None:
        tensors = {f"phase/{name}": tensor for name, tensor in state.items()}
        for name, buffer in named_buffers(self._model).items():
            before = self._buffers.get(name)
            if before is None or not equal_bits(before, buffer):
                tensors[f"buffers/{name}"] = buffer
        for number, (_, own) in enumerate(orders):
            tensors |= {f"order/{number}/{name}": tensor for name, tensor in own.items()}
        tensors["losses"] = torch.tensor(self.losses, dtype=torch.float64, device="cpu")
        content = {
            "step": step,
            "settings": self._settings,
            "base": self._base,
            "orders": [place for place, _ in orders],
        }
        self.folder.mkdir(exist_ok=True)
        save_file(_path(self.folder, step), _KIND, tensors, content, finite=False)
        # Those of later steps are damaged, or were left behind by the one resumed from.
        kept = [each for each in steps_in(self.folder) if each <= step][: self.keep]
        for each in set(steps_in(self.folder)) - set(kept):
            _path(self.folder, each).unlink(missing_ok=True)


@contextlib.contextmanager
def _understood(path: Path) -> Iterator[None]:
    """Refuse a checkpoint whose checksums fit, but whose parts do not."""
    try:
        yield
    except TalosError:
        raise
    except Exception as error:  # which one depends on the part
        raise TalosValueError(
            f"{path}: not a valid checkpoint, got {error!r:.200}; begin anew in another folder"
        ) from error


def check_folder(folder: Path, *, resume: bool) -> None:
    """Refuse a folder that checkpoints cannot be written to, or that holds another training.

    Temporary files that a killed training left there are removed.

    Args:
        folder: it need not exist, but the one around it must.
        resume: checkpoints may be there.

    Raises:
        TalosOSError: it is refused.
    """
    if folder.exists() and not folder.is_dir():
        raise TalosOSError(f"checkpoint must be a folder, got the file {folder}")
    if not folder.parent.is_dir():
        raise TalosOSError(
            f"checkpoint must lie in an existing folder, got {folder}; make {folder.parent}"
        )
    if (steps := steps_in(folder)) and not resume:
        raise TalosOSError(
            f"checkpoint must be a folder without checkpoints, got {folder}, which has step "
            f"{steps[0]}; pass resume=True, or choose another folder"
        )
    there = folder if folder.exists() else folder.parent
    try:
        sweep(folder)
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        raise TalosOSError(
            f"checkpoint must be a folder that can be written, got {there} "
            f"({error.strerror or error}); choose another"
        ) from error


def steps_in(folder: Path) -> list[int]:
    """Return the steps of the checkpoints in a folder, the newest first."""
    found = [_NAME.fullmatch(path.name) for path in folder.glob("step-*")]
    return sorted((int(match[1]) for match in found if match), reverse=True)


def losses_in(folder: str | os.PathLike[str]) -> list[float]:
    """Return the losses of all steps until the newest checkpoint of a folder; [] without one."""
    steps = steps_in(Path(folder))
    if not steps:
        return []
    tensors, _ = load_file(_path(Path(folder), steps[0]), _KIND, finite=False)
    losses: list[float] = tensors["losses"].tolist()
    return losses


def _path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08}.safetensors"
