"""Which entries matter least: the diagonal Fisher information of a model's own labels."""

from talos.calibration.fisher import fisher_diag
from talos.calibration.rounds import calibrate

__all__ = ["calibrate", "fisher_diag"]
