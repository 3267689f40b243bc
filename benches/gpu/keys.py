"""The keys of the records that predictions, bars and the documentation refer to."""

TRITON, CSRC = "Triton", "CUDA C++"
WHOLE = "whole model, fused AdamW"
FROZEN = "frozen, masked, fused AdamW"
ELEMENTWISE = "elementwise"
REPLAYED, EAGER = "replayed", "eager"
PLAIN, SCORED = "plain batch", "scored batch"
THRESHOLD = "threshold"
HISTOGRAM = "histogram, first pass"
CALIBRATION = "calibration"


def step(shape: str, density: float, form: str, how: str) -> str:
    """Of the stage `step`; how: REPLAYED or EAGER."""
    return f"{shape}, d {density:g}, {form}, {how}"


def method(model: str, form: str) -> str:
    """Of the stage `methods`; form: the name of a `talos.app.costs` form, as `nonlinear`."""
    return f"{model}, {form}"


def kernel(op: str, shape: str | int, form: str) -> str:
    """Of the stage `scoring`, a single op: `kernel("fisher_diag_", 257, TRITON)`, by tokens."""
    return f"{op}, {shape}, {form}"


def batch(model: str, what: str) -> str:
    """Of the stage `scoring`; what: PLAIN or SCORED."""
    return f"{model}, {what}"
