"""Estimators of the Fisher information against the expectation that they estimate."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from talos import calibrate, choice_logits, fisher_diag
from talos.batches import logits_and_positions
from talos.calibration.estimators import Estimator, Logits, checked_logits
from talos.errors import TalosTypeError, TalosValueError


def second_moment(values: Tensor, estimator: Estimator, samples: int) -> Tensor:
    """The mean of the squared gradients with respect to the logits, [..., C], over many draws."""
    logits = values.double().expand(samples, *values.shape).clone().requires_grad_()
    total = torch.zeros_like(values, dtype=torch.float64)
    for losses, share, last in estimator.losses(Logits(logits), 0, 0):
        (gradient,) = torch.autograd.grad(losses.sum(), logits, retain_graph=not last)
        total += share * gradient.square().mean(0)
    return total


VALUES = torch.tensor([2.0, 0.5, -1.0, 0.0])


def exact(values: Tensor) -> Tensor:
    """sum_c p_c (e_c - p)^2 = p (1 - p), the Fisher information of a logit."""
    probs = values.double().softmax(-1)
    return probs * (1 - probs)


@pytest.mark.parametrize("labels", ["sampled", "importance"])
@pytest.mark.parametrize("draws", [1, 3])
def test_estimators_are_unbiased(labels: Any, draws: int) -> None:
    estimator = Estimator(draws=draws, labels=labels)
    torch.testing.assert_close(
        second_moment(VALUES, estimator, 4000), exact(VALUES), rtol=0.06, atol=0.004
    )


@pytest.mark.parametrize("labels", ["sampled", "importance"])
def test_estimators_of_sequences_are_unbiased(labels: Any) -> None:
    """For positions that share a parameter: here every position's logits are the same ones."""
    logits = VALUES.double().expand(4000, 3, 4).clone().requires_grad_()
    losses, _, _ = next(Estimator(labels=labels).losses(Logits(logits), 0, 0))
    (gradient,) = torch.autograd.grad(losses.sum(), logits)
    moments = gradient.sum(1).square().mean(0)
    torch.testing.assert_close(moments, 3 * exact(VALUES), rtol=0.08, atol=0.01)


def test_importance_has_the_smaller_variance() -> None:
    def spread(labels: Any) -> float:
        logits = VALUES.double().expand(4000, 4).clone().requires_grad_()
        losses, _, _ = next(Estimator(labels=labels).losses(Logits(logits), 0, 0))
        (gradient,) = torch.autograd.grad(losses.sum(), logits)
        return float(gradient.square().sum(1).var())

    assert spread("importance") < 0.5 * spread("sampled")


def test_certain_classes_have_no_gradient_and_no_nan() -> None:
    values = torch.tensor([0.0, -math.inf, -800.0])
    for labels in ("sampled", "importance"):
        moment = second_moment(values, Estimator(labels=labels), 10)
        assert torch.equal(moment, torch.zeros(3, dtype=torch.float64))


@pytest.mark.parametrize(
    "options",
    [
        {"labels": "true"},
        {"labels": "importance", "target": "logit"},
        {"labels": "importance", "draws": "exact"},
    ],
)
def test_options_that_do_not_go_together(options: dict[str, Any]) -> None:
    with pytest.raises(TalosValueError, match=r"labels(=| must be)"):
        fisher_diag(nn.Linear(3, 2), [torch.randn(8, 3)], **options)


class Reader(nn.Module):
    """Tokens to logits at every position; what stands behind a position does not matter."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.inner = nn.Linear(6, 6)
        self.read = nn.Linear(6, 5)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.embed(input_ids)
        if attention_mask is not None:
            x = x * attention_mask[..., None]
        return self.read(torch.tanh(self.inner(x.cumsum(1))))


IDS = torch.tensor([[1, 2, 3, 4], [5, 6, 0, 0], [7, 8, 9, 0]])
MASK = (IDS > 0).long()


@pytest.mark.parametrize("labels", ["sampled", "importance"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_does_not_count(labels: Any, side: str) -> None:
    model = Reader().double()
    order = slice(None) if side == "right" else [3, 2, 1, 0]
    ids, mask = IDS[:, order], MASK[:, order]
    if side == "left":
        ids = torch.stack([torch.cat([row[row == 0], row[row > 0].flip(0)]) for row in ids])
        mask = (ids > 0).long()
    padded = fisher_diag(
        model, [{"input_ids": ids, "attention_mask": mask}], params=".", labels=labels
    )
    alone = [{"input_ids": row[row > 0][None]} for row in ids]
    expected = fisher_diag(model, alone, params=".", labels=labels)
    for name, score in padded.items():
        torch.testing.assert_close(score, expected[name], rtol=1e-5, atol=1e-9, msg=name)


def test_positions_may_come_from_logits_fn() -> None:
    model = Reader().double()
    last = torch.zeros(IDS.shape).bool()
    last[:, -1] = True
    whole = fisher_diag(model, [IDS], logits_fn=lambda model, ids: (model(ids), last), params=".")
    expected = fisher_diag(
        model, [IDS], logits_fn=lambda model, ids: model(ids)[:, -1:], params="."
    )
    for name, score in whole.items():
        torch.testing.assert_close(score, expected[name], rtol=1e-6, atol=1e-12)


def test_positions_that_do_not_fit_are_refused() -> None:
    values = torch.zeros(2, 3, 4)
    with pytest.raises(TalosTypeError, match="positions as a bool tensor"):
        checked_logits((values, torch.ones(2, 3)))
    with pytest.raises(TalosValueError, match=r"positions \[2, 3\] beside logits"):
        checked_logits((values, torch.ones(3, 2) > 0))
    with pytest.raises(TalosValueError, match="a position for every sample"):
        checked_logits((values, torch.tensor([[True, False, False], [False] * 3])))
    with pytest.raises(TalosValueError, match=r"beside logits \[B, T, V\]"):
        checked_logits((values[0], torch.ones(3, 4) > 0))


def test_labels_of_an_encoder_decoder_tell_what_counts() -> None:
    import transformers

    config = transformers.T5Config(
        vocab_size=13, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2,
        decoder_start_token_id=0,
    )  # fmt: skip
    model = transformers.T5ForConditionalGeneration(config).eval()
    batch = {"input_ids": IDS, "attention_mask": MASK, "labels": IDS.masked_fill(IDS == 0, -100)}
    _, positions = logits_and_positions(model, batch)
    assert torch.equal(positions, MASK > 0)


# -- answers to choose among


def language_model(kind: str) -> nn.Module:
    import transformers

    torch.manual_seed(1)
    if kind == "T5":
        config = transformers.T5Config(
            vocab_size=13, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2,
            decoder_start_token_id=0,
        )  # fmt: skip
        return transformers.T5ForConditionalGeneration(config).double().eval()
    if kind == "GPT-2":
        config = transformers.GPT2Config(vocab_size=13, n_embd=8, n_layer=1, n_head=2)
        return transformers.GPT2LMHeadModel(config).double().eval()
    sizes = {
        "vocab_size": 13, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2,
    }  # fmt: skip
    if kind == "Mistral":
        config = transformers.MistralConfig(**sizes, head_dim=4, sliding_window=4)
        return transformers.MistralForCausalLM(config).double().eval()
    attention = "eager" if kind == "eager Llama" else "sdpa"
    config = transformers.LlamaConfig(**sizes, attn_implementation=attention)
    return transformers.LlamaForCausalLM(config).double().eval()


CHOICES = torch.tensor([[4, 5, -100, -100], [6, -100, -100, -100], [7, 8, 9, 3]])


def log_prob_alone(model: nn.Module, prompt: Tensor, answer: Tensor) -> Tensor:
    """One prompt and one answer without any padding."""
    if model.config.is_encoder_decoder:
        logits = model(input_ids=prompt[None], labels=answer[None]).logits[0]
    else:
        logits = model(input_ids=torch.cat([prompt, answer])[None]).logits[0, len(prompt) - 1 : -1]
    return -functional.cross_entropy(logits, answer, reduction="sum")


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("kind", ["T5", "GPT-2", "Llama", "eager Llama", "Mistral"])
def test_answers_have_the_log_probability_that_each_has_alone(kind: str, side: str) -> None:
    model = language_model(kind)
    ids = IDS
    if side == "left":
        ids = torch.stack([torch.cat([row[row == 0], row[row > 0]]) for row in IDS])
    batch = {
        "input_ids": ids,
        "attention_mask": (ids > 0).long(),
        "choice_ids": CHOICES.expand(3, -1, -1),
    }
    if kind == "T5" and side == "left":
        pytest.skip("T5's relative positions see padding on the left as a shift")
    with torch.no_grad():
        found = choice_logits(model, batch)
        for row, prompt in enumerate(ids):
            for choice, answer in enumerate(CHOICES):
                alone = log_prob_alone(model, prompt[prompt > 0], answer[answer >= 0])
                torch.testing.assert_close(found[row, choice], alone)


@pytest.mark.parametrize("kind", ["GPT-2", "Llama"])
def test_decoders_make_logits_only_where_an_answer_is_predicted(kind: str) -> None:
    model = language_model(kind)
    batch = {"input_ids": IDS, "attention_mask": MASK, "choice_ids": CHOICES.expand(3, -1, -1)}
    shapes: list[torch.Size] = []
    model.lm_head.register_forward_hook(lambda head, inputs, output: shapes.append(output.shape))
    found = choice_logits(model, batch)
    assert shapes == [(3, 1 + 1 + 3, 13)]  # behind the prompt, 4, 7, 8 and 9

    class Whole(nn.Module):
        """Hides the argument, as a model without it."""

        def __init__(self) -> None:
            super().__init__()
            self.config, self.model = model.config, model

        def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Any:
            return self.model(
                input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids
            )

    torch.testing.assert_close(found, choice_logits(Whole(), batch))
    assert shapes[1] == (9, IDS.shape[1] + 3, 13)  # it may take no mask for each place


def test_answers_of_one_token_need_no_row_of_their_own() -> None:
    model = language_model("Llama")
    seen: list[torch.Size] = []
    model.model.register_forward_pre_hook(
        lambda module, inputs, options: seen.append(options["input_ids"].shape), with_kwargs=True
    )
    answers = torch.tensor([[4, -100], [6, -100], [7, -100]]).expand(3, -1, -1)
    batch = {"input_ids": IDS, "attention_mask": MASK, "choice_ids": answers}
    found = choice_logits(model, batch)
    assert seen == [IDS.shape]
    alone = log_prob_alone(model, IDS[1][IDS[1] > 0], torch.tensor([7]))
    torch.testing.assert_close(found[1, 2], alone)


def test_each_prompt_may_have_answers_of_its_own() -> None:
    model = language_model("Llama")
    answers = torch.stack([CHOICES, CHOICES.roll(1, 0), CHOICES.roll(2, 0)])
    batch = {"input_ids": IDS, "attention_mask": MASK, "choice_ids": answers}
    found = choice_logits(model, batch)
    for row, prompt in enumerate(IDS):
        for choice, answer in enumerate(answers[row]):
            alone = log_prob_alone(model, prompt[prompt > 0], answer[answer >= 0])
            torch.testing.assert_close(found[row, choice], alone)


def test_training_gets_the_gradient_of_answers_that_are_alone() -> None:
    model = language_model("Llama")
    batch = {"input_ids": IDS, "attention_mask": MASK, "choice_ids": CHOICES.expand(3, -1, -1)}
    labels = torch.tensor([2, 0, 1])
    functional.cross_entropy(choice_logits(model, batch), labels).backward()
    found = {name: param.grad.clone() for name, param in model.named_parameters()}
    model.zero_grad()
    alone = [
        [log_prob_alone(model, prompt[prompt > 0], answer[answer >= 0]) for answer in CHOICES]
        for prompt in IDS
    ]
    functional.cross_entropy(torch.stack([torch.stack(row) for row in alone]), labels).backward()
    for name, param in model.named_parameters():
        torch.testing.assert_close(found[name], param.grad, msg=name)


@pytest.mark.parametrize("kind", ["T5", "GPT-2", "Llama"])
def test_answers_are_scored_as_single_samples_are(kind: str) -> None:
    model = language_model(kind)
    batch = {
        "input_ids": IDS, "attention_mask": MASK, "choice_ids": CHOICES.expand(3, -1, -1),
    }  # fmt: skip
    options: dict[str, Any] = {"logits_fn": choice_logits, "draws": "exact"}
    together = fisher_diag(model, [batch], **options)
    single = [{key: value[row : row + 1] for key, value in batch.items()} for row in range(3)]
    alone = fisher_diag(model, single, **options)
    for name, score in together.items():
        torch.testing.assert_close(score, alone[name], rtol=1e-4, atol=1e-12, msg=name)
    calibrate(model, [batch] * 4, 0.2, logits_fn=choice_logits, check=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"choice_ids": None}, "but choice_ids is missing"),
        ({"choice_ids": CHOICES}, r"choice_ids must be \[B, C, L\]"),
        ({"attention_mask": MASK[:, :2]}, r"attention_mask \[B, S\]"),
        ({"choice_ids": CHOICES.flip(-1).expand(3, -1, -1)}, "padding before a token"),
        ({"choice_ids": torch.full((3, 2, 2), -100)}, "an empty answer"),
    ],
)
def test_batches_without_answers_are_refused(change: dict[str, Any], message: str) -> None:
    batch = {"input_ids": IDS, "attention_mask": MASK, "choice_ids": CHOICES.expand(3, -1, -1)}
    batch = {key: value for key, value in (batch | change).items() if value is not None}
    with pytest.raises(TalosValueError, match=message):
        choice_logits(language_model("T5"), batch)
