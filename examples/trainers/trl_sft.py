"""Fine-tune with TRL's SFTTrainer: the same argument and the same callback as for the Trainer."""

import sys
from pathlib import Path

from datasets import Dataset
from tiny import CALIBRATION, pretrained
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import nn
from transformers import PreTrainedTokenizerFast
from transformers.trainer_utils import get_last_checkpoint
from trl import SFTConfig, SFTTrainer

import talos
from talos.training.hugging_face import TaskVectorCallback


def train(model: nn.Module, folder: Path) -> talos.SparseAdam:
    words = ["<end>", "the", "cat", "saw", "a", "dog", "and", "this", "dog", "ran", "away", "."]
    split_words = Tokenizer(WordLevel({word: words.index(word) for word in words}))
    split_words.pre_tokenizer = Whitespace()
    texts = [{"text": " ".join(words[1 : 3 + number % 9])} for number in range(64)]
    optimizer = talos.SparseAdam(model, talos.calibrate(model, CALIBRATION, density=0.1), lr=1e-2)
    arguments = SFTConfig(
        str(folder), max_steps=8, per_device_train_batch_size=4, gradient_accumulation_steps=2,
        save_steps=2, save_total_limit=2, report_to=[], bf16=False,
    )  # fmt: skip
    trainer = SFTTrainer(
        model, arguments, train_dataset=Dataset.from_list(texts), optimizers=(optimizer, None),
        processing_class=PreTrainedTokenizerFast(
            tokenizer_object=split_words, eos_token="<end>", pad_token="<end>"
        ), callbacks=[TaskVectorCallback()],
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(folder)))
    return optimizer


if __name__ == "__main__":
    train(pretrained(), Path(sys.argv[1]))
