"""The command: python -m benches.gpu --out DIR

It needs torch, triton, pytest and pytest-xdist on the path; no registry and no installed project.
What is not installed, open_clip say, is left out or replaced, and the table names it. It leaves in
DIR a JSON for each stage, table.md, which is renewed after each stage, and log.txt.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benches.gpu.context import read_stage
from benches.gpu.schedule import MINUTES, STAGES, Schedule, Stage


def arguments(argv: Sequence[str] | None, stages: Sequence[Stage]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benches.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="for the results")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for all stages together")
    parser.add_argument("--resume", action="store_true", help="do what is missing in DIR")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes, no device")
    parser.add_argument("--dry-run", action="store_true", help="list the stages, do nothing")
    names = [stage.name for stage in stages]
    parser.add_argument("--only", choices=names, action="append", help="leave out the others")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None, stages: Sequence[Stage] = STAGES) -> int:
    """Return 0 if all is well, 1 if something failed or was cut, 2 if nothing could start."""
    options = arguments(argv, stages)
    chosen = [stage for stage in stages if not options.only or stage.name in options.only]
    out = options.out.resolve()
    schedule = Schedule(out, options.minutes, options.resume, options.rehearse, stages)
    if options.dry_run:
        for stage in chosen:
            print(f"{stage.name}: at most {schedule.limit(stage):.0f} s; {stage.title}")
        total = sum(map(schedule.limit, chosen))
        print(f"together: at most {min(total, 60 * options.minutes):.0f} s")
        return 0
    trouble = _trouble(schedule)
    if trouble:
        print(f"benches.gpu: {trouble}", file=sys.stderr)
        return 2
    return 0 if schedule.run(chosen) else 1


def _trouble(schedule: Schedule) -> str:
    """Return why nothing can start; empty if it can."""
    import torch

    if not schedule.rehearse and not torch.cuda.is_available():
        return "a device must be there, got none; --rehearse runs without, `make bench` on the CPU"
    out, stages = schedule.out, [f"{stage.name}.json" for stage in schedule.stages]
    if not schedule.resume and any((out / name).exists() for name in (*stages, "table.md")):
        return f"--out must hold no results yet, got {out} with some; add --resume to go on"
    rehearsed = [read_stage(out / name).machine.get("rehearsed") for name in stages]
    if any(each not in (None, schedule.rehearse) for each in rehearsed):
        return f"--out must hold no rehearsal beside measurements, got {out}; name another"
    return ""


if __name__ == "__main__":
    sys.exit(main())
