"""What was predicted before anything ran on a device, and the bars: the table prints both.

The predictions were read from the compiled code for an H200; docs/gpu.md says what follows from
each. A prediction finds its measurement by stage, key and field, a bar is a limit on it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

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

    def verdict(self, measured: float | None) -> str:
        """The bar, and whether it is met; nothing where there is no bar."""
        bars = [f"at most {self.most:g}"] if self.most is not None else []
        bars += [f"at least {self.least:g}"] if self.least is not None else []
        if not bars:
            return ""
        if measured is None:
            return f"{bars[0]}: not measured"
        met = (self.most is None or measured <= self.most) and (
            self.least is None or measured >= self.least
        )
        return f"{bars[0]}: {'met' if met else 'MISSED'}"


PREDICTIONS: tuple[Prediction, ...] = ()
