"""A tiny Llama and random texts; they stand for your model and your data."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM


class Batches(DataLoader[Tensor]):
    """A loader that goes on after the batches of its state, as torchdata's StatefulDataLoader."""

    done = 0

    def __iter__(self) -> Any:
        """Yield the batches that are left of an epoch."""
        for number, batch in enumerate(super().__iter__(), 1):
            if number > self.done:
                self.done = number
                yield batch
        self.done = 0

    def state_dict(self) -> dict[str, int]:
        """Return how many batches of the epoch are done."""
        return {"done": self.done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on where that state was taken."""
        self.done = state["done"]


TEXTS: Any = torch.randint(64, (256, 8), generator=torch.Generator().manual_seed(1))  # tokens
CALIBRATION = [{"input_ids": texts} for texts in TEXTS.split(32)]
BATCHES = Batches(TEXTS[:64], batch_size=4)


def pretrained() -> LlamaForCausalLM:
    """Return the same model each time."""
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        initializer_range=0.2,  # so large that gradients are clipped
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config)
