"""What was compared and who won, in plain sentences."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from talos.app.report.results import Results
from talos.app.report.rows import percent, titles

__all__ = [
    "chance",
    "compared",
    "headline",
    "leading",
    "remarks",
    "summaries",
    "verdict",
    "winner",
    "zero_shot",
]

_MANY = 4  # rows that a sentence lists by name
_SEEDS = 3  # fewer say too little about the chance of training for a verdict


def headline(results: Results) -> list[str]:
    """Summarise the results, whichever row is better: a sentence or two for each model."""
    several = len(results["models"]) > 1
    found = [compared(results)]
    for model in results["models"]:
        sentence = winner(results, model["name"])
        if sentence:
            found.append(f"{model['name']}: {sentence}" if several else sentence)
    return found + remarks(results)


def compared(results: Results) -> str:
    """Say what was compared."""
    rows = list(_named(results).values())
    models = _listed([model["name"] for model in results["models"]])
    tasks = _count(len(results["tasks"]), "task")
    seeds = _count(max((entry["seeds"] for entry in results["summary"]), default=1), "seed")
    named = f"{_listed(rows)}: " if len(rows) <= _MANY else ""
    return _capital(
        f"{named}{_count(len(rows), 'way')} of fine-tuning {models}, compared on {tasks} with "
        f"{seeds}. Each task is learned alone and gives a task vector, an edit of the weights. The "
        "vectors of all tasks are then added to one model, which is tested on all tasks."
    )


def summaries(results: Results, model: str) -> dict[str, dict[str, Any]]:
    """Return the summary of each row of a model, in the order of the tables."""
    found = {each["row"]: each for each in results["summary"] if each["model"] == model}
    return {row: found[row] for row in titles(results) if row in found}


def leading(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the rows whose merged model is the most accurate, as far as it is printed.

    Args:
        found: the summary of each row, at least one.
    """
    added = {row: each["figures"]["added"]["value"] for row, each in found.items()}
    best = percent(max(added.values()))
    return [row for row, value in added.items() if percent(value) == best]


def zero_shot(results: Results, model: str) -> float:
    """Return the mean accuracy of a pretrained model over the tasks."""
    return fmean(each["value"] for each in results["zero_shot"][model].values())


def verdict(summary: Mapping[str, Any], key: str = "added") -> str:
    """Say how a row's figure is against the first row's: an interval may hold zero.

    Better or worse needs three seeds; with fewer, another seed may turn it round.
    """
    gap = summary["against_first"]
    if not gap:
        return ""
    up, down = ("ahead", "behind") if summary["seeds"] < _SEEDS else ("better", "worse")
    return up if gap[key]["low"] > 0 else down if gap[key]["high"] < 0 else "not clear"


def chance(results: Results) -> str:
    """Say what the intervals of the summary are over."""
    seeds = max((entry["seeds"] for entry in results["summary"]), default=1)
    return "test examples and seeds" if seeds > 1 else "test examples alone, with one seed"


def winner(results: Results, model: str) -> str:
    """Say which row's merged model is the most accurate, and whether chance explains it.

    A row wins if three seeds were run, its lead over each other row has an interval above zero, and
    its own interval lies above the pretrained model's accuracy.
    """
    found = summaries(results, model)
    if not found:
        return ""
    named = _named(results)
    added = {row: each["figures"]["added"] for row, each in found.items()}
    first, best = next(iter(found)), max(added, key=lambda row: added[row]["value"])
    shares = {row: f"{percent(each['value'])} %" for row, each in added.items()}
    level = leading(found)
    rivals = [row for row in found if row not in level]
    pretrained = zero_shot(results, model)
    before = f"the pretrained model {percent(pretrained)} %"
    beside = [max(rivals, key=lambda row: added[row]["value"])] if rivals else []
    beside += [first] if first in rivals and first not in beside else []
    others = ", ".join((*(f"{named[row]} {shares[row]}" for row in beside), before))
    answers = f"{shares[best]} of the test examples right, {others}."
    names = _few([named[row] for row in level])
    if added[best]["value"] <= pretrained:
        return (
            f"No row beats the pretrained model: with all task vectors added, the best, {names}, "
            f"{'answer' if len(level) > 1 else 'answers'} {answers}"
        )
    if len(found) == 1:
        return f"With all task vectors added, {names} answers {answers}"
    close = [named[row] for row in rivals if _close(found[row])]
    close += ["the pretrained model"] if added[best]["low"] <= pretrained else []
    seeds = min(each["seeds"] for each in found.values())
    lead = "are level" if len(level) > 1 else "is ahead"
    if close:
        lead += f", but without a clear lead over {_few(close)}"
    if seeds < _SEEDS:
        lead += f", and with {_count(seeds, 'seed')} alone another seed may turn this round"
    elif not close and len(level) == 1:
        lead = "wins"
    they = "they answer" if len(level) > 1 else "it answers"
    sentences = [f"{names} {lead}: with all task vectors added {they} {answers}"]
    gaps = found[best]["against_first"]
    if gaps and first in rivals:
        whose = f"of {named[best]} " if len(level) > 1 else ""
        value, low, high = (f"{100 * gaps['added'][key]:+.1f}" for key in ("value", "low", "high"))
        sentences.append(
            f"The difference {whose}from {named[first]} is {value} points, 95 % interval {low} to "
            f"{high} over {chance(results)}."
        )
        kinds: dict[str, list[str]] = {}
        for row in rivals:
            kinds.setdefault(verdict(found[row]), []).append(named[row])
        order = ("better", "ahead", "worse", "behind", "not clear")
        parts = [f"{_few(kinds[kind])} ({kind})" for kind in order if kind in kinds]
        if parts:
            sentences.append(f"The others against {named[first]}: {', '.join(parts)}.")
    return _capital(" ".join(sentences))


def _close(summary: Mapping[str, Any]) -> bool:
    """Return whether chance may explain the lead of the best row over this one."""
    gap = summary["against_best"]
    return not gap or bool(gap["added"]["low"] <= 0)


def remarks(results: Results) -> list[str]:
    """Say what has no figures, and which searches chose the first or the last coefficient."""
    found = []
    for model in results["models"]:
        name = model["name"]
        at = f" on {name}" if len(results["models"]) > 1 else ""
        measured = summaries(results, name)
        asked = [each["title"] for each in results["recipe"]["rows"] if each["row"] not in measured]
        if asked:
            found.append(f"Not measured{at}, because it failed or was not run: {'; '.join(asked)}.")
        for row, title in _named(results).items():
            runs = [run for run in results["runs"] if (run["model"], run["row"]) == (name, row)]
            none = sum(run["addition"]["scaling_coef"] == 0 for run in runs)
            if none:
                found.append(
                    f"With {title}{at} no sum of the vectors had a better normalised accuracy on "
                    f"validation data in {none} of {_count(len(runs), 'run')}: the merged model is "
                    "the pretrained one."
                )
            most = sum(
                run["addition"]["scaling_coef"] == run["addition"]["grid"][-1]["scaling_coef"]
                for run in runs
            )
            if most:
                found.append(
                    f"With {title}{at} the largest coefficient was taken in {most} of "
                    f"{_count(len(runs), 'run')}: a larger one may be better."
                )
            left = [
                task
                for run in runs
                for task, each in run["negation"].items()
                if each and each["scaling_coef"] == 0
            ]
            if left:
                tasks = _listed(list(dict.fromkeys(left)))
                found.append(f"With {title}{at} nothing was subtracted to forget {tasks}.")
        found += _ends(results, name, at)
    tried = {row["title"]: len(row["lr"]) for row in results["rows"]}
    if len(set(tried.values())) > 1:
        counts = "; ".join(f"{title}: {count}" for title, count in tried.items())
        found.append(f"Not every row had as many learning rates to choose from: {counts}.")
    elif len(tried) > 1 and 1 in tried.values():
        found.append("Each row had one learning rate: with others the order may be another one.")
    return found


def _ends(results: Results, model: str, at: str) -> list[str]:
    """Say which rows took the largest or smallest learning rate that they tried."""
    tried, named, found = {r["row"]: r["lr"] for r in results["rows"]}, _named(results), []
    for end, more, word in ((max, "larger", "largest"), (min, "smaller", "smallest")):
        taken = [
            named[row]
            for row, each in summaries(results, model).items()
            if len(tried[row]) > 1
            and each["lr"] == end(tried[row])
            and not _tied(results["rates"].get(model, {}).get(row, ()))
        ]
        if taken:
            found.append(
                f"{_capital(_listed(taken))}{at} took the {word} learning rate that was tried: a "
                f"{more} one may be better."
            )
    return found


def _tied(points: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether another rate is as good as the chosen one, which is then the smallest."""
    best = [point["added"] for point in points if point["chosen"]]
    return sum(point["added"] in best for point in points) > 1


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"


def _named(results: Results) -> dict[str, str]:
    """Return the rows' titles for a sentence: `TaLoS (density 0.1)` for `TaLoS, density 0.1`."""
    parts = {row: title.partition(", ") for row, title in titles(results).items()}
    return {row: f"{a} ({b})" if b else a for row, (a, _, b) in parts.items()}


def _capital(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]


def _listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), *names[-1:])))


def _few(names: Sequence[str]) -> str:
    """Join names, or count them where they are many."""
    return _listed(names) if len(names) <= _MANY else f"{len(names)} rows"
