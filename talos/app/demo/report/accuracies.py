"""The sections on accuracy: tasks, single tasks, addition, negation, interference."""

from collections.abc import Iterable

from talos.app.demo.report import charts, heatmaps
from talos.app.demo.report.html import escape, estimate, figure, method_label, section, table
from talos.app.demo.report.results import Results, percent

__all__ = ["addition", "interference", "negation", "single", "tasks"]


def tasks(results: Results) -> str:
    """Return the section that lists the tasks with their classes and examples."""
    rows = []
    for task in results["tasks"]:
        used = task["examples"]
        rows.append(
            (
                f"<b>{escape(task['name'])}</b>",
                f"<div class=long>{escape(task['description'])}</div>",
                str(task["classes"]),
                f"{used['train']:,}",
                f"{used['validation']:,}",
                f"{used['test']:,}",
            )
        )
    return section(
        "The tasks",
        "Texts or images are classified by comparing their embedding with the embeddings of the "
        "class texts (a frozen zero-shot head); a language model chooses among the class texts. "
        "Scaling coefficients are chosen on validation examples. All "
        "numbers in the tables below are measured on test examples.",
        table(
            ("task", "what it asks", "classes", "train", "validation", "test"), rows, text_columns=2
        ),
    )


def single(results: Results) -> str:
    """Return the section that compares zero-shot and single-task accuracy."""
    methods = results["methods"]
    rows = []
    for task in results["tasks"]:
        name = task["name"]
        row = [escape(name), estimate(results["zero_shot"][name])]
        row += [estimate(results["single"][m["name"]][name]) for m in methods]
        rows.append(row)
    mean = ["<i>mean</i>", _mean(results["zero_shot"])]
    mean += [_mean(results["single"][m["name"]]) for m in methods]
    rows.append(mean)
    return section(
        "Single-task accuracy",
        "Test accuracy in per cent with its 95 % bootstrap interval: the pretrained encoder, and "
        "the encoder tuned on that task alone.",
        table(("task", "zero-shot", *(method_label(results, m) for m in methods)), rows),
    )


def addition(results: Results) -> str:
    """Return the section on the merged models and the choice of the coefficient."""
    methods = results["methods"]
    added = [results["addition"][m["name"]] for m in methods]
    rows = [
        ["scaling coefficient", *(f"<b>{a['scaling_coef']:.2f}</b>" for a in added)],
        ["absolute", *(estimate(a["absolute"]) for a in added)],
        ["normalised", *(estimate(a["normalised"]) for a in added)],
    ]
    for task in results["tasks"]:
        rows.append([escape(task["name"]), *(estimate(a["tasks"][task["name"]]) for a in added)])
    return section(
        "Addition: one model for all tasks",
        "base + scaling coefficient × (sum of all task vectors). Absolute: mean accuracy over the "
        "tasks. Normalised: the mean of each task's accuracy divided by that of its own single-task"
        " model. Task rows: accuracy of the merged model.",
        "<div class=pair>",
        table(("", *(method_label(results, m) for m in methods)), rows),
        figure(
            charts.accuracy_curve(results),
            "Mean validation accuracy of the merged model; a dot marks the chosen coefficient.",
            "accuracy of the merged model against the scaling coefficient",
        ),
        "</div>",
        _why_zero((method["title"], each) for method, each in zip(methods, added, strict=True)),
    )


def negation(results: Results) -> str:
    """Return the section on how far each task was forgotten, and what that costs the others."""
    methods = results["methods"]
    rows = []
    for task in results["tasks"]:
        for method in methods:
            entry = results["negation"][method["name"]][task["name"]]
            rows.append(
                (
                    f"{escape(task['name'])}<br>{method_label(results, method)}",
                    f"{entry['scaling_coef']:.2f}",
                    percent(entry["target_zero_shot"]["value"]),
                    estimate(entry["target"]),
                    percent(entry["control_zero_shot"]["value"]),
                    estimate(entry["control"]),
                )
            )
    share = percent(results["settings"].get("control_share", 0.95))
    pictures = "".join(
        figure(
            charts.negation_curve(results, task["name"]),
            f"Forgetting {task['name']}: validation accuracy, target solid, control dashed.",
            f"negation of {task['name']} against the scaling coefficient",
        )
        for task in results["tasks"]
    )
    return section(
        "Negation: forgetting one task",
        "base − scaling coefficient × task vector. The control is the mean of the other tasks. The "
        f"coefficient keeps {share} % of its pretrained validation accuracy. Of those that do, it "
        "is the nearest to the mean of the best ones of resamples, where the best one has the "
        "lowest accuracy on the target. Target: lower is better. Control: higher is better. Test "
        "accuracy, before and after.",
        table(
            (
                "task forgotten, method",
                "coef.",
                "target before",
                "target after",
                "control before",
                "control after",
            ),
            rows,
        ),
        _why_zero(
            (f"{task['name']}, {m['title']}", results["negation"][m["name"]][task["name"]])
            for task in results["tasks"]
            for m in methods
        ),
        f"<div class=grid>{pictures}</div>",
    )


def interference(results: Results) -> str:
    """Return the section on what each vector does to the other tasks."""
    names = [task["name"] for task in results["tasks"]]
    pictures = "".join(
        figure(
            heatmaps.matrix(
                f"interference-{method['name']}",
                results["interference"][method["name"]],
                names,
                low=0.7,
                high=1.3,
                colours="RdBu",
                row_label="vector of",
                column_label="accuracy on",
            ),
            f"{method['title']}: test accuracy with one vector added, divided by zero-shot.",
            f"interference matrix of {method['title']}",
        )
        for method in results["methods"]
    )
    return section(
        "Interference",
        "The effect of one task's vector on every task: acc_j(base + vector_i) / acc_j(base). The "
        "diagonal is the gain on the vector's own task. Elsewhere 1.00 means no interference, and "
        "less means harm.",
        f"<div class=grid>{pictures}</div>",
    )


def _why_zero(searches: Iterable[tuple[str, Results]]) -> str:
    """Return a line for each search that ended in no edit."""
    found = [f"{name}: {each['why_zero']}." for name, each in searches if each.get("why_zero")]
    return "".join(f"<p>{escape(line)}</p>" for line in found)


def _mean(estimates: dict[str, dict[str, float]]) -> str:
    values = [estimate["value"] for estimate in estimates.values()]
    return f"<b>{percent(sum(values) / len(values))}</b>"
