"""What a training iteration costs, by method: time, memory, launches, beside the paper's numbers.

`make_workload` makes a published architecture with random weights and a batch, `measure` runs forms
of fine-tuning on it side by side, `talos.app.costs.results` makes files and tables of what was
found.
"""

from talos.app.costs.forms import BASELINE, COMPILED, FORMS, OURS
from talos.app.costs.iteration import ITERATIONS, Agreement, Cost, Memory, measure
from talos.app.costs.paper import PAPER, Reported
from talos.app.costs.running import Form, Running
from talos.app.costs.workload import LAYERS, MODELS, Workload, library_model, make_workload

__all__ = [
    "BASELINE",
    "COMPILED",
    "FORMS",
    "ITERATIONS",
    "LAYERS",
    "MODELS",
    "OURS",
    "PAPER",
    "Agreement",
    "Cost",
    "Form",
    "Memory",
    "Reported",
    "Running",
    "Workload",
    "library_model",
    "make_workload",
    "measure",
]
