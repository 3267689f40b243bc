"""The figures that decide: what was predicted before anything ran on a device, and the bars.

The predictions were read from the compiled code for an H200; docs/gpu.md has the questions that
they answer. A figure finds its measurement by stage, key and field; a bar is a limit on it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Records = Mapping[str, Mapping[str, Mapping[str, Any]]]


@dataclass(frozen=True)
class Figure:
    """One figure. `over` is the key whose field it is divided by, `scale` makes its unit."""

    name: str
    unit: str
    stage: str
    key: str
    field: str = "seconds"
    predicted: float | None = None
    most: float | None = None
    least: float | None = None
    over: str | None = None
    scale: float = 1.0

    def measured(self, records: Records) -> float | None:
        stage = records.get(self.stage, {})
        value = stage.get(self.key, {}).get(self.field)
        unit = 1.0 if self.over is None else stage.get(self.over, {}).get(self.field)
        if value is None or not unit:
            return None
        return float(value) / float(unit) * self.scale

    @property
    def expected(self) -> str:
        """Return the prediction and the bar in words."""
        predicted = [] if self.predicted is None else [f"{self.predicted:g} {self.unit}".strip()]
        return "; ".join([*predicted, *self._bars()])

    def _bars(self) -> list[str]:
        bars = (("at most", self.most), ("at least", self.least))
        return [f"{word} {bar:g} {self.unit}".strip() for word, bar in bars if bar is not None]

    def verdict(self, measured: float | None) -> str:
        """Return the bar, and whether it is met; nothing where there is no bar."""
        bars = self._bars()
        if not bars:
            return ""
        if measured is None:
            return f"{bars[0]}: not measured"
        met = (self.most is None or measured <= self.most) and (
            self.least is None or measured >= self.least
        )
        return f"{bars[0]}: {'met' if met else 'MISSED'}"


TITLES = {"vit-l-14": "ViT-L/14", "t5-large": "T5-Large", "vit-b-32": "ViT-B/32"}


def _step(model: str, predicted: float, share: float, least: float | None) -> tuple[Figure, ...]:
    title, ours = TITLES[model], f"{model}, d 0.6, Triton, replayed"
    whole = f"{model}, d 0.6, whole model, fused AdamW, replayed"
    of_copy = f"step of {title} as a share of a copy's bandwidth"
    beside = f"fused AdamW over all of {title} beside our step"
    return (
        Figure(f"step of {title}", "us", "step", ours, predicted=predicted, scale=1e6),
        Figure(of_copy, "", "step", ours, "share", predicted=share, least=least),
        Figure(beside, "x", "step", whole, over=ours, least=7.5),
    )


def _iteration(model: str, most_memory: float) -> tuple[Figure, ...]:
    title, ours, dense = TITLES[model], f"{model}, talos", f"{model}, nonlinear"
    time = f"iteration of {title} beside non-linear fine-tuning"
    memory = f"peak memory of {title} beside non-linear fine-tuning"
    return (
        Figure(time, "x", "methods", ours, "total", over=dense, most=0.5),
        Figure(memory, "x", "methods", ours, "peak_bytes", over=dense, most=most_memory),
    )


def _scoring(tokens: int, predicted: float) -> Figure:
    name = f"scoring kernel, bf16, 128 samples of {tokens} tokens, 1024 x 1024"
    key = f"fisher_diag_, {tokens}, Triton"
    return Figure(name, "us", "scoring", key, predicted=predicted, scale=1e6)


def _batch(model: str) -> Figure:
    name = f"scored batch of {TITLES[model]} beside a plain one"
    scored, plain = f"{model}, scored batch", f"{model}, plain batch"
    return Figure(name, "x", "scoring", scored, over=plain, most=1.15)


FIGURES = (
    *_step("vit-l-14", 310, 0.82, 0.8),
    *_step("t5-large", 930, 0.82, 0.8),
    *_step("vit-b-32", 88, 0.82, None),
    Figure(
        "step of ViT-L/14 at d = .1 as a share of a copy's bandwidth",
        "",
        "step",
        "vit-l-14, d 0.1, Triton, replayed",
        "share",
        predicted=0.6,
    ),
    *_iteration("vit-l-14", 0.4),
    *_iteration("t5-large", 0.4),
    *_iteration("vit-b-32", 0.5),
    _scoring(257, 180),
    _scoring(50, 50),
    _batch("vit-l-14"),
    _batch("t5-large"),
    Figure("threshold of 3e8 scores", "ms", "scoring", "threshold", most=3.0, scale=1e3),
    Figure(
        "histogram of 8.5e7 scores, first pass",
        "ms",
        "scoring",
        "histogram, first pass",
        predicted=0.1,
        scale=1e3,
    ),
    Figure(
        "sampled product of a ViT-B/32 layer",
        "us",
        "scoring",
        "sddmm_, vit-b-32 layer, Triton",
        predicted=14,
        scale=1e6,
    ),
    Figure(
        "swap of a ViT-L/14 vector", "ms", "scoring", "swap, vit-l-14, Triton", most=1.0, scale=1e3
    ),
)
