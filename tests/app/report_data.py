"""Made-up results of an experiment, complete in the schema of `talos.app.report.results`."""

from itertools import count
from typing import Any

KINDS = ("query", "key", "value", "attention out", "mlp in", "mlp out", "norm", "bias")
MODELS = ("minilm", "a <b> & $_$")
TASKS = ("modules", "exceptions <b>", "http & $mail$")
SEEDS = (0, 1, 2)
ROWS = {  # id: title, method, rates of which the second is chosen, whether it has masks
    "talos-density-0.1": ("TaLoS, density 0.1", "talos", (3e-4, 1e-3, 3e-3), True),
    "random": ("random mask", "random", (3e-4, 1e-3), True),
    "nonlinear": ("non-linear fine-tuning", "nonlinear", (1e-5, 5e-5), False),
}
FIRST = next(iter(ROWS))


def made_up(models: tuple[str, ...] = MODELS) -> dict[str, Any]:
    """Return results with all measures: accuracies lie in [0.2, 0.98] and differ."""
    numbers = ((0.6180339887 * each) % 1 for each in count(1))

    def number(low: float = 0.5, high: float = 0.8) -> float:
        return round(low + (high - low) * next(numbers), 6)

    def interval(value: float) -> dict[str, float]:
        return {"value": value, "low": round(value - 0.0211, 6), "high": round(value + 0.0187, 6)}

    def estimate(low: float = 0.5, high: float = 0.8, n: int = 400) -> dict[str, float]:
        return interval(number(low, high)) | {"n": n}

    def matrix(low: float, high: float, *, diagonal: float | None = None) -> list[list[float]]:
        places = range(len(TASKS))
        return [
            [diagonal if diagonal is not None and i == j else number(low, high) for j in places]
            for i in places
        ]

    def of_rows(make: Any, *, masked: bool = False) -> dict[str, Any]:
        """Make something for each model and row; `masked`: only for the rows that have masks."""
        return {
            model: {row: make() for row, about in ROWS.items() if about[3] or not masked}
            for model in models
        }

    def of_tasks(make: Any) -> dict[str, Any]:
        return {task: make() for task in TASKS}

    def mask() -> dict[str, Any]:
        structure = [
            {"layer": str(layer), "kind": kind, "nnz": 10 + layer * 7 + place, "numel": 100 + place}
            for layer in range(3)
            for place, kind in enumerate(KINDS)
        ]
        return {
            "nnz": sum(each["nnz"] for each in structure),
            "numel": sum(each["numel"] for each in structure),
            "tensors": 96,
            "tensors_touched": 31,
            "stability": number(0.9, 1.0),
            "structure": structure,
        }

    def negation() -> dict[str, Any]:
        grid: list[dict[str, Any]] = [
            {"scaling_coef": i / 20, "target": 0.5 - 0.016 * i, "control": 0.5 - 0.003 * i}
            for i in range(21)
        ]
        grid[-1]["target"] = None  # not measured where the control is lost
        return {
            "grid": grid,
            "scaling_coef": 0.85,
            "why_zero": None,
            "target": estimate(0.2, 0.3),
            "control": estimate(0.4, 0.45),
            "target_zero_shot": estimate(0.41, 0.5),
            "control_zero_shot": estimate(0.44, 0.5),
        }

    def run(model: str, row: str, seed: int) -> dict[str, Any]:
        _, method, rates, _ = ROWS[row]
        sparse = method != "nonlinear"
        grid: list[dict[str, Any]] = [
            {"scaling_coef": i / 20, "absolute": 0.4 + number(0.014, 0.016) * i, "normalised": None}
            for i in range(21)
        ]
        for point in grid:
            point["normalised"] = point["absolute"] + 0.2
        return {
            "model": model,
            "row": row,
            "seed": seed,
            "lr": rates[1],
            "trainable": 1_060_000 if sparse else 10_600_000,
            "bytes": 2_400_000 if sparse else 45_000_000,
            "single": of_tasks(lambda: estimate(0.8, 0.98)),
            "training": of_tasks(
                lambda: {"steps": 80, "first_loss": number(1, 2), "last_loss": number(0.1, 0.9)}
            ),
            "addition": {
                "grid": grid,
                "scaling_coef": 0.65,
                "why_zero": None,
                "absolute": estimate(0.6, 0.8, 1200),
                "normalised": estimate(0.8, 0.95, 1200),
                "tasks": of_tasks(estimate),
            },
            "negation": of_tasks(negation if seed == SEEDS[0] else lambda: None),
        }

    def rates(row: str) -> list[dict[str, Any]]:
        swept = ROWS[row][2]
        return [
            {
                "lr": lr,
                "alone": number(0.8, 0.95),
                "added": number(0.6, 0.8),
                "normalised": number(0.8, 0.95),
                "scaling_coef": 0.5,
                "chosen": place == 1,
            }
            for place, lr in enumerate(swept)
        ]

    firsts: dict[str, Any] = {}

    def summary(model: str, row: str) -> dict[str, Any]:
        def over_seeds(low: float, high: float) -> dict[str, Any]:
            value = number(low, high)
            return interval(value) | {"by_seed": [value - 0.01, value, value + 0.01]}

        figures = {
            "alone": over_seeds(0.85, 0.95),
            "added": over_seeds(0.6, 0.75),
            "normalised": over_seeds(0.8, 0.9),
            "target": over_seeds(0.2, 0.3),
            "control": over_seeds(0.4, 0.45),
        }
        if row == FIRST:
            firsts[model] = figures
        keys = ("added", "normalised")
        gaps = {key: figures[key]["value"] - firsts[model][key]["value"] for key in keys}
        return {
            "model": model,
            "row": row,
            "lr": ROWS[row][2][1],
            "seeds": len(SEEDS),
            "figures": figures,
            "against_first": None
            if row == FIRST
            else {key: interval(round(gap, 6)) for key, gap in gaps.items()},
        }

    def summaries(model: str) -> list[dict[str, Any]]:
        found = [summary(model, row) for row in ROWS]
        values = [each["figures"]["added"]["value"] for each in found]
        for each, value in zip(found, values, strict=True):
            lead = round(max(values) - value, 6)
            each["against_best"] = {"added": interval(lead)} if lead else None
        return found

    def cost() -> dict[str, float]:
        times = {"calibrate": number(10, 20), "train": number(20, 40), "step": number(0.1, 0.5)}
        return times | {"peak_bytes": 700_000_000}

    files: list[dict[str, Any]] = [
        {
            "path": f"vectors/{row}-{place}-{seed}-{lr:g}.safetensors",
            "kind": "vector",
            "model": model,
            "row": row,
            "task": task,
            "seed": seed,
            "lr": lr,
            "bytes": 45_000_000 if row == "nonlinear" else 2_400_000,
            "entries": 10_600_000 if row == "nonlinear" else 1_060_000,
        }
        for model in models
        for row in ROWS
        for seed in SEEDS
        for lr in (ROWS[row][2] if seed == SEEDS[0] else ROWS[row][2][1:2])
        for place, task in enumerate(TASKS)
    ]
    files += [
        {
            **file,
            "path": file["path"].replace("vectors", "masks"),
            "kind": "mask",
            "lr": None,
            "bytes": 230_000,
        }
        for file in files
        if ROWS[file["row"]][3] and file["lr"] == ROWS[file["row"]][2][1]
    ]
    return {
        "schema": "talos-experiment",
        "schema_version": 1,
        "created": "2025-01-02T03:04:05+00:00",
        "title": "Made-up tasks & models",
        "machine": {"cpu": "A CPU <4>", "cores": 2, "threads": 2, "system": "Linux x86_64"},
        "versions": {"talos": "0.1.0", "torch": "2.11.0"},
        "recipe": {
            "title": "Made-up tasks & models",
            "seeds": list(SEEDS),
            "models": [{"source": model, "name": model} for model in models],
            "tasks": [{"data": task, "name": None, "settings": {}} for task in TASKS],
            "rows": [{"row": row, "title": title} for row, (title, *_) in ROWS.items()],
            "training": {"steps": 80, "batch_size": 32, "max_length": 48, "warmup": None},
            "evaluation": {"coefficients": 21, "control_share": 0.95, "resamples": 2000},
        },
        "models": [
            {
                "name": model,
                "source": model,
                "parameters": 22_713_216,
                "maskable": 10_646_784,
                "dense_bytes": 90_852_864,
            }
            for model in models
        ],
        "tasks": [
            {
                "name": task,
                "description": f"which of {place + 4} it is",
                "reads": "texts",
                "classes": place + 4,
                "chance": 1 / (place + 4),
                "examples": {"train": 2001 + place, "validation": 251 + place, "test": 501 + place},
            }
            for place, task in enumerate(TASKS)
        ],
        "rows": [
            {
                "row": row,
                "title": title,
                "method": method,
                "settings": {"density": 0.1, "rounds": 4, "steps": 80} if masked else {"steps": 80},
                "lr": list(swept),
            }
            for row, (title, method, swept, masked) in ROWS.items()
        ],
        "zero_shot": {model: of_tasks(lambda: estimate(0.4, 0.5)) for model in models},
        "rates": {model: {row: rates(row) for row in ROWS} for model in models},
        "runs": [run(model, row, seed) for model in models for row in ROWS for seed in SEEDS],
        "summary": [each for model in models for each in summaries(model)],
        "masks": of_rows(lambda: of_tasks(mask), masked=True),
        "mask_iou": of_rows(lambda: matrix(0.5, 0.9, diagonal=1.0), masked=True),
        "interference": of_rows(lambda: matrix(0.8, 1.3)),
        "disentanglement": of_rows(
            lambda: {
                "tasks": list(TASKS[:2]),
                "coefs": [-1.0, 0.0, 1.0],
                "error": [[number(0.0, 0.6) for _ in range(3)] for _ in range(3)],
            }
        ),
        "linearity": of_rows(
            lambda: of_tasks(
                lambda: {
                    "tuned": estimate(0.8, 0.95),
                    "expansion": estimate(0.6, 0.8),
                    "equal": number(0.6, 0.9),
                }
            )
        ),
        "sensitivity": of_rows(lambda: matrix(0.3, 1.0)),
        "drift": of_rows(
            lambda: of_tasks(
                lambda: [
                    {"step": step, "squared": number(0, step + 1), "ratio": number(0, 1)}
                    for step in range(0, 81, 20)
                ]
            )
        ),
        "files": files,
        "timings": {
            "total": 5120.0,
            "by_kind": {"mask": 400.0, "vector": 3000.0, "addition": 1500.0, "negation": 220.0},
            "by_row": of_rows(cost),
        },
    }
