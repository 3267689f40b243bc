"""Which entries matter least: the diagonal Fisher information of a model's own labels."""

from talos.calibration.fisher import calibrate, fisher_diag

__all__ = ["calibrate", "fisher_diag"]
