"""The costs that the paper reports, on its authors' machine: arXiv 2504.02620."""

from dataclasses import dataclass

__all__ = ["PAPER", "Reported"]


@dataclass(frozen=True)
class Reported:
    """One method on one model.

    Attributes:
        forward_backward: seconds an iteration.
        optimizer: seconds an iteration.
        peak_gib: peak memory in GiB.
    """

    forward_backward: float
    optimizer: float
    peak_gib: float

    @property
    def total(self) -> float:
        """Seconds of a whole iteration."""
        return self.forward_backward + self.optimizer


PAPER: dict[str, dict[str, Reported]] = {
    "vit-b-32": {
        "nonlinear": Reported(0.3608, 0.0114, 6.5),
        "linearized": Reported(0.6858, 0.0103, 10.2),
        "l_lora": Reported(0.3270, 0.0036, 5.3),
        "lota": Reported(0.3289, 0.1269, 6.8),
        "talos": Reported(0.1256, 0.0388, 4.7),
    },
    "vit-l-14": {
        "nonlinear": Reported(1.2174, 0.0156, 18.6),
        "linearized": Reported(1.6200, 0.0262, 21.3),
        "l_lora": Reported(0.5153, 0.0082, 9.7),
        "lota": Reported(0.8438, 0.4449, 15.4),
        "talos": Reported(0.1891, 0.1372, 7.8),
    },
    "t5-large": {
        "nonlinear": Reported(0.9047, 0.0894, 30.0),
        "linearized": Reported(1.7683, 0.1170, 35.1),
        "l_lora": Reported(0.7452, 0.0136, 18.2),
        "lota": Reported(0.8526, 0.3842, 32.1),
        "talos": Reported(0.4358, 0.0509, 12.1),
    },
}
"""By model and method; of minilm the paper has none."""
