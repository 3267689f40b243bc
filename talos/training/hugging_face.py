"""A callback that saves the task vector in each checkpoint of transformers' Trainer."""

from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from talos.distributed import errors_on_all_ranks
from talos.errors import TalosTypeError
from talos.optim import SparseAdam

__all__ = ["TaskVectorCallback"]


class TaskVectorCallback(TrainerCallback):
    """Saves `task_vector.safetensors` in each checkpoint of a `Trainer` that trains by SparseAdam.

    It serves subclasses such as TRL's `SFTTrainer`, too. The file lies in the checkpoint's folder,
    so that `save_total_limit` deletes both. With several processes all of them make the vector, and
    the first writes it.

    Raises:
        TalosTypeError: at the beginning of the training, if the optimizer is no `SparseAdam`.

    Example:
        >>> from transformers import Trainer
        >>> callback = TaskVectorCallback()
        >>> trainer = Trainer(model, callbacks=[callback])  # doctest: +SKIP
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuse another optimizer."""
        sparse_adam(kwargs["optimizer"])

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Save the vector in the checkpoint that was just written."""
        vector = sparse_adam(kwargs["optimizer"]).task_vector()
        folder = Path(str(args.output_dir), f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
        with errors_on_all_ranks():
            if state.is_world_process_zero:
                vector.save(folder / "task_vector.safetensors")


def sparse_adam(optimizer: Any) -> SparseAdam:
    """Return the SparseAdam inside the wrappers of a trainer."""
    inner = optimizer
    while not isinstance(inner, SparseAdam):
        if not hasattr(inner, "optimizer"):
            raise TalosTypeError(
                f"optimizer must be a talos.SparseAdam, got {type(inner).__name__}; pass "
                "optimizers=(talos.SparseAdam(model, mask), None) to the trainer"
            )
        inner = inner.optimizer
    return inner
