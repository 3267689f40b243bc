"""What was predicted before anything ran on a device, and the bars: the table prints both.

The predictions were read from the compiled code for an H200; docs/gpu.md says what follows from
each. A prediction finds its measurement by stage, key and field, a bar is a limit on it.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from benches.gpu import keys

Records = Mapping[str, Mapping[str, Mapping[str, Any]]]


@dataclass(frozen=True)
class Prediction:
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
        """The prediction and the bar in words."""
        predicted = [] if self.predicted is None else [f"{self.predicted:g} {self.unit}".strip()]
        return "; ".join([*predicted, *self._bars()])

    def _bars(self) -> list[str]:
        bars = (("at most", self.most), ("at least", self.least))
        return [f"{word} {bar:g} {self.unit}".strip() for word, bar in bars if bar is not None]

    def verdict(self, measured: float | None) -> str:
        """The bar, and whether it is met; nothing where there is no bar."""
        bars = self._bars()
        if not bars:
            return ""
        if measured is None:
            return f"{bars[0]}: not measured"
        met = (self.most is None or measured <= self.most) and (
            self.least is None or measured >= self.least
        )
        return f"{bars[0]}: {'met' if met else 'MISSED'}"


def _predictions() -> Iterator[Prediction]:
    for shape, title, roofline, predicted in (
        ("vit-l-14", "ViT-L/14", 254, 310),
        ("t5-large", "T5-Large", 763, 930),
        ("vit-b-32", "ViT-B/32", 72, 88),
    ):
        ours = keys.step(shape, 0.6, keys.TRITON, keys.REPLAYED)
        whole = keys.step(shape, 0.6, keys.WHOLE, keys.REPLAYED)
        least = None if shape == "vit-b-32" else 0.8
        yield Prediction(f"step of {title}", "us", "step", ours, predicted=predicted, scale=1e6)
        yield Prediction(
            f"step of {title} as a share of a copy's bandwidth",
            "",
            "step",
            ours,
            "share",
            predicted=round(roofline / predicted, 2),
            least=least,
        )
        yield Prediction(
            f"fused AdamW over all of {title} beside our step",
            "x",
            "step",
            whole,
            over=ours,
            least=7.5,
        )
    yield Prediction(
        "step of ViT-L/14 at d = .1 as a share of a copy's bandwidth",
        "",
        "step",
        keys.step("vit-l-14", 0.1, keys.TRITON, keys.REPLAYED),
        "share",
        predicted=0.6,
    )
    for model, title, most in (
        ("vit-l-14", "ViT-L/14", 0.4),
        ("t5-large", "T5-Large", 0.4),
        ("vit-b-32", "ViT-B/32", 0.5),
    ):
        ours, dense = keys.method(model, "talos"), keys.method(model, "nonlinear")
        yield Prediction(
            f"iteration of {title} beside non-linear fine-tuning",
            "x",
            "methods",
            ours,
            "total",
            over=dense,
            most=0.5,
        )
        yield Prediction(
            f"peak memory of {title} beside non-linear fine-tuning",
            "x",
            "methods",
            ours,
            "peak_bytes",
            over=dense,
            most=most,
        )
    for tokens, predicted in ((257, 180), (50, 50)):
        yield Prediction(
            f"scoring kernel, bf16, 128 samples of {tokens} tokens, 1024 x 1024",
            "us",
            "scoring",
            keys.kernel("fisher_diag_", tokens, keys.TRITON),
            predicted=predicted,
            scale=1e6,
        )
    for model, title in (("vit-l-14", "ViT-L/14"), ("t5-large", "T5-Large")):
        yield Prediction(
            f"scored batch of {title} beside a plain one",
            "x",
            "scoring",
            keys.batch(model, keys.SCORED),
            over=keys.batch(model, keys.PLAIN),
            most=1.15,
        )
    yield Prediction(
        "threshold of 3e8 scores", "ms", "scoring", keys.THRESHOLD, most=3.0, scale=1e3
    )
    yield Prediction(
        "histogram of 8.5e7 scores, first pass",
        "ms",
        "scoring",
        keys.HISTOGRAM,
        predicted=0.1,
        scale=1e3,
    )
    yield Prediction(
        "sampled product of a ViT-B/32 layer",
        "us",
        "scoring",
        keys.kernel("sddmm_", "vit-b-32 layer", keys.TRITON),
        predicted=14,
        scale=1e6,
    )
    yield Prediction(
        "swap of a ViT-L/14 vector",
        "ms",
        "scoring",
        keys.kernel("swap", "vit-l-14", keys.TRITON),
        most=1.0,
        scale=1e3,
    )


PREDICTIONS = tuple(_predictions())
