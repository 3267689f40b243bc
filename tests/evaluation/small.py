"""Two small tasks around one encoder, and edited models made the plain way: copied and dense."""

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy

import torch
from torch import Tensor, nn

from talos.evaluation import Judge
from talos.masks import Mask
from talos.names import named_parameters
from talos.task_vectors import TaskVector

TASKS = ("left", "right")
BATCH = 16
EXAMPLES = {"left": 48, "right": 41}
Data = dict[str, tuple[Tensor, Tensor]]


def small_models() -> dict[str, nn.Module]:
    """A head for each task on one encoder, in training mode with dropout."""
    torch.manual_seed(3)
    encoder = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.5))
    return {task: nn.Sequential(encoder, nn.Linear(8, 4)) for task in TASKS}


def small_data(seed: int) -> Data:
    """Inputs [n, 6] of each task, and labels that its own vector gives, a quarter of them drawn."""
    generator = torch.Generator().manual_seed(seed)
    data = {}
    models = small_models()
    for task, vector in small_vectors(models).items():
        model = edited(models, [(1.0, vector)])[task]
        inputs = torch.randn(EXAMPLES[task], 6, generator=generator)
        labels = logits_of(model, inputs).argmax(1)
        drawn = torch.randint(4, labels.shape, generator=generator)
        data[task] = inputs, torch.where(torch.arange(len(labels)) % 4 == 0, drawn, labels)
    return data


def batches(data: Data, task: str) -> list[tuple[Tensor, Tensor]]:
    return list(zip(*(part.split(BATCH) for part in data[task]), strict=True))


def small_vectors(models: Mapping[str, nn.Module]) -> dict[str, TaskVector]:
    """A vector of the encoder for each task: other entries, other dtypes."""
    params = {n: p for n, p in named_parameters(models["left"]).items() if n.startswith("0.")}
    generator = torch.Generator().manual_seed(5)
    vectors = {}
    for task, dtype in zip(TASKS, (torch.float32, torch.bfloat16), strict=True):
        mask = Mask.from_dense(
            {name: torch.rand(p.shape, generator=generator) < 0.6 for name, p in params.items()}
        )
        vectors[task] = TaskVector(mask, torch.randn(mask.nnz, generator=generator).to(dtype))
    return vectors


def edited(
    models: Mapping[str, nn.Module], terms: Sequence[tuple[float, TaskVector]]
) -> dict[str, nn.Module]:
    """Copies of the models with the sum of scaled, dense vectors on their encoder."""
    copies = deepcopy(dict(models))
    params = named_parameters(copies["left"])
    with torch.no_grad():
        for coef, vector in terms:
            for name in vector.mask.names:
                params[name] += coef * vector.to_dense(name).float()
    return copies


def logits_of(model: nn.Module, inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return deepcopy(model).eval()(inputs)


def share(model: nn.Module, data: tuple[Tensor, Tensor]) -> float:
    """The accuracy of a model, by hand."""
    inputs, labels = data
    right = [
        int(row.argmax()) == int(label)
        for row, label in zip(logits_of(model, inputs), labels, strict=True)
    ]
    return sum(right) / len(right)


class Counted:
    """A judge that notes when it is called."""

    def __init__(self, judge: Judge, calls: list[str], name: str) -> None:
        self.judge, self.calls, self.name = judge, calls, name

    def __call__(self, model: nn.Module) -> Tensor:
        self.calls.append(self.name)
        return self.judge(model)


def judges(
    data: Data, make: Callable[..., Judge], calls: list[str] | None = None, split: str = ""
) -> dict[str, Judge]:
    """A judge for each task."""
    made = {task: make(batches(data, task)) for task in TASKS}
    return made if calls is None else {t: Counted(j, calls, split + t) for t, j in made.items()}
