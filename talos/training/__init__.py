"""Training: the plain loop over a method's phases."""

from talos.training.loop import FineTuneStep, fine_tune, fine_tune_steps

__all__ = ["FineTuneStep", "fine_tune", "fine_tune_steps"]
