"""Commands in several processes, as torchrun starts them: one group, one that prints and writes."""

import contextlib
import importlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from talos.errors import TalosRuntimeError

__all__ = ["IN_SEVERAL", "errors_of_all", "is_loss", "joined", "several"]

IN_SEVERAL = ("calibrate", "train")
"""The commands that share their work among processes."""


def several() -> int:
    """Return how many processes torchrun started with this one; 1 without torchrun.

    Example:
        >>> several()
        1
    """
    size = os.environ.get("WORLD_SIZE", "1") if {"RANK", "MASTER_ADDR"} <= set(os.environ) else "1"
    return int(size) if size.isdecimal() else 1


def errors_of_all() -> contextlib.AbstractContextManager[object]:
    """Return a block for a command: where it raises in one process, it raises in all."""
    if several() == 1:
        return contextlib.nullcontext()
    from talos.distributed import errors_on_all_ranks

    return errors_on_all_ranks()


def is_loss(error: RuntimeError) -> bool:
    """Return whether an error says that another process is gone: gloo has no type for it."""
    dist = sys.modules.get("torch.distributed")
    return "gloo/transport" in str(error) or (
        dist is not None and isinstance(error, dist.DistError)
    )


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Join the group of the processes that torchrun started, and leave it when the block ends.

    Only rank 0 prints. Each process has the GPU of its LOCAL_RANK where there are GPUs.

    Raises:
        TalosRuntimeError: the processes do not meet.
    """
    if several() == 1:
        yield
        return
    import torch
    import torch.distributed as dist

    # Its functions keep the group that there is when it is imported as their default. Imported
    # later, they would keep this group, whose threads then end the process with SIGABRT.
    importlib.import_module("torch.distributed.nn.functional")

    with_gpus = torch.cuda.is_available()
    if with_gpus:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    try:
        dist.init_process_group("nccl" if with_gpus else "gloo")
    except (RuntimeError, ValueError) as error:
        raise TalosRuntimeError(
            "the processes must meet at MASTER_ADDR and MASTER_PORT, got "
            f"{str(error).splitlines()[0]}; start them with torchrun"
        ) from error
    try:
        with contextlib.ExitStack() as silent:
            if dist.get_rank() > 0:
                nowhere = silent.enter_context(Path(os.devnull).open("w"))
                silent.enter_context(contextlib.redirect_stdout(nowhere))
                silent.enter_context(contextlib.redirect_stderr(nowhere))
            yield
            sys.stdout.flush()
        # torchrun ends the others as soon as one has failed: wait until rank 0 has printed.
        with contextlib.suppress(RuntimeError):  # of a rank that is gone
            dist.barrier()
    finally:
        dist.destroy_process_group()
