"""Answers to choose among behind one prompt, beside a row of prompt and answer for each.

A batch has 16 prompts of 48 tokens with 4 answers each, for SmolLM2-135M. Both forms return the
same log-probabilities. A record holds the seconds of processor time of one call and its peak
memory: of a forward, and of a step of training all weights.

    ours    a prompt runs once: `talos.choice_logits`
    rows    64 rows, and logits where an answer is predicted
"""

import time
from collections.abc import Callable, Mapping
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from benches import measure
from benches.results import OURS, add_result
from talos import choice_logits
from talos.app.models import load_encoder
from talos.tensors import trim_heap

PROMPTS, TOKENS, WARMUP = 16, 48, 2
ANSWERS = {"1 token": (1, 1, 1, 1), "1 to 4 tokens": (1, 2, 3, 4)}

Batch = Mapping[str, Tensor]
Logits = Callable[[nn.Module, Batch], Tensor]


def rows(model: nn.Module, batch: Batch) -> Tensor:
    """Return the log-probabilities [B, C]: each answer has a row with its prompt."""
    choices = batch["choice_ids"]
    answers = choices.flatten(0, 1)
    prompts = batch["input_ids"].repeat_interleave(choices.shape[1], 0)
    seen = torch.cat([torch.ones_like(prompts), (answers >= 0).long()], 1)
    last = answers.shape[1] + 1
    logits = model(
        input_ids=torch.cat([prompts, answers.clamp_min(0)], 1),
        attention_mask=seen,
        position_ids=seen.cumsum(1) - 1,
        logits_to_keep=last,
    ).logits[:, :-1]
    losses = functional.cross_entropy(logits.transpose(1, 2), answers, reduction="none")
    return -losses.sum(1).view(choices.shape[:2])


def batch_of(lengths: tuple[int, ...], prompts: int, vocabulary: int) -> dict[str, Tensor]:
    """Return random prompts, with answers of these numbers of tokens."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (prompts, TOKENS), generator=draw)
    answers = torch.randint(vocabulary, (len(lengths), max(lengths)), generator=draw)
    for row, length in enumerate(lengths):
        answers[row, length:] = -100
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "choice_ids": answers.expand(prompts, -1, -1),
    }


def forward(model: nn.Module, logits: Logits, batch: Batch) -> Tensor:
    with torch.no_grad():
        return logits(model, batch)


def training(model: nn.Module, logits: Logits, batch: Batch) -> Tensor:
    found = logits(model, batch)
    functional.cross_entropy(found, torch.zeros(len(found), dtype=torch.int64)).backward()
    for param in model.parameters():
        param.grad = None
    return found.detach()


def cost(work: Callable[[], Tensor]) -> tuple[Tensor, float, int]:
    """Return what a call returns, its seconds of processor time, and its peak memory in bytes."""
    found: list[Tensor] = []
    seconds: list[float] = []

    def timed() -> None:
        start = time.process_time()
        found.append(work())
        seconds.append(time.process_time() - start)

    trim_heap()
    peak = measure.peak_bytes(timed)
    return found[0], seconds[0], peak


def bench_choices(request: pytest.FixtureRequest) -> None:
    pytest.importorskip("gguf")
    model = load_encoder("smollm2").model
    vocabulary = len(model.get_input_embeddings().weight)
    out = request.config.getoption("--out")
    for words, lengths in ANSWERS.items():
        few, batch = (batch_of(lengths, count, vocabulary) for count in (WARMUP, PROMPTS))
        for work in (forward, training):
            results = {}
            for form, logits in ((OURS, choice_logits), ("rows", rows)):
                work(model, logits, few)
                results[form] = cost(partial(work, model, logits, batch))
            torch.testing.assert_close(results[OURS][0], results["rows"][0], atol=1e-3, rtol=1e-4)
            for form, (_, seconds, peak) in results.items():
                record = {
                    "op": "choices",
                    "shape": f"smollm2, {PROMPTS} x {TOKENS} tokens, answers of {words}, "
                    f"{work.__name__}",
                    "form": form,
                    "seconds": seconds,
                    "peak_bytes": peak,
                    "seconds_of_rows": results["rows"][1] / seconds,
                    "bytes_of_rows": results["rows"][2] / peak,
                }
                if out:
                    add_result(out, record | measure.machine())
            assert results[OURS][1] < results["rows"][1]
