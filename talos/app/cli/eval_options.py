"""The options of `talos eval`: how they are read, and which contradict each other."""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from talos.app.cli.console import note
from talos.app.cli.options import check_choice, check_input
from talos.app.cli.records import check_json
from talos.app.cli.suggestions import methods_of
from talos.errors import TalosValueError

__all__ = ["check_expansion", "check_options", "check_use", "parse_scale"]


def check_options(
    data: Sequence[str],
    vector: Sequence[Path],
    merged: Path | None,
    metric: Sequence[str],
    scale: str | None,
    linearized: bool,
    json: str | None,
    overwrite: bool,
) -> None:
    """Refuse options that contradict each other, before anything is loaded."""
    if len({os.path.realpath(each) for each in data}) < len(data):
        raise TalosValueError(f"--data must differ, got {' '.join(data)}")
    from talos.app.cli.measurements import MEASUREMENTS

    for each in metric:
        check_choice("--metric", each, (*MEASUREMENTS, "all"))
    for path in vector:
        check_input("--vector", path)
    if scale is not None and not vector:
        raise TalosValueError(
            f"--vector must be given with --scale {scale}, got none; leave --scale out to "
            "evaluate the pretrained model"
        )
    if linearized and not vector:
        raise TalosValueError(
            "--vector must be given with --linearized, got none; without a vector the expansion "
            "is the model itself"
        )
    if merged is not None:
        check_input("--merged", merged)
        if len(vector) < 2:
            raise TalosValueError(
                "--vector must be given for each merged task with --merged, got "
                f"{len(vector)}; to evaluate one file pass it as --vector"
            )
        if metric and not {"addition", "all"} & set(metric):
            raise TalosValueError(
                f"--metric must hold addition with --merged, got {' '.join(metric)}; add "
                "--metric addition"
            )
    check_json(json, overwrite)


def check_use(
    scale: str | None, grid: bool, points: int | None, vectors: int, metric: Sequence[str]
) -> None:
    """Refuse --scale and --points where no metric takes them."""
    scaled = {"addition"} if vectors > 1 else {"accuracy", "linearity"}
    searched = {"negation", "disentanglement"}
    if grid:
        searched |= {"addition"} if vectors > 1 else {"accuracy"}
    names = set(metric) or {"accuracy", "addition"}  # the metrics by default
    if scale is not None and not names & {*scaled, "all"}:
        raise TalosValueError(
            f"--scale must be left out with --metric {' '.join(metric)}, got {scale}; it is for "
            f"{' and '.join(sorted(scaled))}"
        )
    if points is not None and not names & {*searched, "all"}:
        raise TalosValueError(
            f"--points must be left out where no coefficient is searched, got {points}; pass "
            "--vector with --scale grid or --metric negation"
        )


def parse_scale(scale: str | None, vectors: int) -> float | None:
    """Read --scale: a finite number, or None for the grid."""
    if scale is None:
        return None if vectors > 1 else 1.0
    if scale == "grid":
        return None
    try:
        value = float(scale)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise TalosValueError(f"--scale must be a finite number or grid, got {scale}")
    return value


def check_expansion(metadata: Mapping[str, Any], linearized: bool) -> None:
    """Warn if a vector's method, or one in its sum, does not fit --linearized."""
    wrong = sorted(name for name in methods_of(metadata) if (name == "linearized") != linearized)
    if wrong:
        where = "without --linearized, got it" if linearized else "with --linearized, got none"
        note(
            f"warning: a vector of the method {', '.join(wrong)} must be evaluated {where}; the "
            "accuracy below is that of another function than was trained",
        )
