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
from talos.files import OtherFile, load_file, save_file
from talos.files.atomic import sweep, system_errors
from talos.methods import Phase
from talos.names import named_buffers, named_parameters
from talos.task_vectors.fingerprints import fingerprint
from talos.tensors import equal_bits
from talos.training.order import Order, under

__all__ = ["Checkpoints", "check_checkpoint", "check_folder", "losses_in", "steps_in"]

_NAME = re.compile(r"step-([0-9]{8}|[1-9][0-9]{8,})\.safetensors")
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
        TalosValueError: the checkpoint found belongs to a training with other settings or initial
            weights; or none of those that are there is intact, or one is of another kind or
            version; or a parameter is sharded.
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
        self.folder, self._model, self._settings = Path(folder), model, dict(settings)
        self.every, self.keep = every, keep
        params = named_parameters(model)
        if sharded := [name for name, param in params.items() if is_sharded(param)]:
            raise TalosValueError(
                f"checkpoint must be None with sharded parameters, got {len(sharded)} of them; "
                "save and load with torch.distributed.checkpoint in a loop of your own"
            )
        self._buffers = {n: each.detach().clone() for n, each in named_buffers(model).items()}
        self._base = {name: fingerprint(each) for name, each in {**params, **self._buffers}.items()}
        self.step = 0
        self.losses: list[float] = []
        self._damaged: list[int] = []
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
            except OtherFile:
                raise
            except TalosValueError as error:
                self._damaged.append(step)
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
                f"model must have the weights and buffers with which {path} began, got others in "
                f"{', '.join(names[:5])}; load the base again"
            )
        with _understood(path):
            self.step, self.losses = step, [float(each) for each in tensors["losses"].tolist()]
            if len(self.losses) != step:
                raise ValueError(f"{len(self.losses)} losses")
            for place in content["orders"]:
                if not all(0 <= operator.index(place[key]) < 1 << 63 for key in ("epoch", "taken")):
                    raise ValueError(f"the place {place} in the data")
            if not content["orders"]:
                raise ValueError("no place in the data")

    def resumed(self, phase: Phase) -> Phase:
        """Return the phase that was reached, given the first; the model's buffers go there, too."""
        if self._found is None:
            return phase
        tensors, content = self._found
        saved = under(f"buffers/{_place(content)}/", tensors)
        with errors_on_all_ranks(), _understood(_path(self.folder, self.step)):
            own = named_buffers(self._model)
            for name, each in saved.items():
                if (each.shape, each.dtype) != (own[name].shape, own[name].dtype):
                    raise ValueError(f"{each.dtype} {list(each.shape)} for the buffer {name}")
            phase = phase.resumed(under("phase/", tensors))
            with torch.no_grad():
                for name, each in saved.items():
                    own[name].copy_(each)
        return phase

    def go_to(self, order: Order) -> bool:
        """Let the data go on where they were, and the generators too; False: it is the start."""
        if self._found is None:
            return False
        tensors, content = self._found
        self._found = None  # everything has been read
        own = _place(content)
        with errors_on_all_ranks():
            place = content["orders"][own]
            order.go_to(place, under(f"order/{own}/", tensors), draws=own == rank())
        return True

    def save(self, phase: Phase, order: Order, step: int, loss: float, last: bool) -> None:
        """Note a step, and write a checkpoint if it is time; the last step is always written.

        Raises:
            TalosOSError: it cannot be written; the older ones stay as they were.
        """
        self.losses.append(loss)
        if step % self.every and not last:
            return
        with errors_on_all_ranks() as parts:
            parts.append((*order.state(), self._moved()))
        state = phase.state()  # of all ranks: it may be gathered
        with errors_on_all_ranks():
            if rank() == 0:
                self._write(step, state, parts)

    def _moved(self) -> dict[str, Tensor]:
        """Return this rank's buffers that moved, on the CPU."""
        return {
            name: buffer.detach().cpu()
            for name, buffer in named_buffers(self._model).items()
            if (before := self._buffers.get(name)) is None or not equal_bits(before, buffer)
        }

    def _write(self, step: int, state: dict[str, Tensor], parts: list[Any]) -> None:
        tensors = {f"phase/{name}": tensor for name, tensor in state.items()}
        for number, (_, own, moved) in enumerate(parts):
            tensors |= {f"order/{number}/{name}": tensor for name, tensor in own.items()}
            tensors |= {f"buffers/{number}/{name}": buffer for name, buffer in moved.items()}
        tensors["losses"] = torch.tensor(self.losses, dtype=torch.float64, device="cpu")
        content = {
            "step": step,
            "settings": self._settings,
            "base": self._base,
            "orders": [place for place, _, _ in parts],
        }
        with _writable(self.folder):
            self.folder.mkdir(exist_ok=True)
            save_file(_path(self.folder, step), _KIND, tensors, content, finite=False)
            damaged = {each for each in self._damaged if each != step}
            intact = [n for n in steps_in(self.folder) if n <= step and n not in damaged]
            for each in {*intact[self.keep :], *damaged}:
                _path(self.folder, each).unlink(missing_ok=True)
            self._damaged = []


def _place(content: Mapping[str, Any]) -> int:
    """Return whose part of a checkpoint this rank takes: a rank more than there were, rank 0's.

    Such a rank keeps generators of its own.
    """
    return rank() if rank() < len(content["orders"]) else 0


def _writable(folder: Path) -> contextlib.AbstractContextManager[None]:
    return system_errors(
        f"checkpoint must be a folder that can be written, got {folder}", "choose another"
    )


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


def check_checkpoint(folder: object, batches: object, *, resume: bool) -> None:
    """Refuse a training that checkpoints are not for, before all ranks look at the folder.

    Args:
        folder: None: there will be none.
        batches: of the training.
        resume: go on from one.

    Raises:
        TalosTypeError: `folder` is no path.
        TalosValueError: `resume` is given without a folder, or the batches cannot be found again.
    """
    if folder is None:
        if resume:
            raise TalosValueError("resume must be False without checkpoint, got True; pass both")
    elif not isinstance(folder, str | os.PathLike):
        raise TalosTypeError(
            f"checkpoint must be the path of a folder, got {type(folder).__name__}"
        )
    elif getattr(batches, "persistent_workers", False):
        raise TalosValueError(
            "batches must be a loader with persistent_workers=False for a checkpoint, got True; "
            "such workers draw on from one epoch to the next"
        )


def check_folder(folder: Path, *, resume: bool) -> None:
    """Refuse a folder that checkpoints cannot be written to, or that holds another training.

    Temporary files that a killed training left there are removed.

    Args:
        folder: it need not exist, but the one around it must.
        resume: checkpoints may be there.

    Raises:
        TalosOSError: it is refused.
    """
    with _writable(folder):
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
    with _writable(there):
        sweep(folder)
        tempfile.TemporaryFile(dir=there).close()


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
