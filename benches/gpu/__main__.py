"""The command: python -m benches.gpu --out DIR

    --resume      takes up in a folder what is missing there
    --rehearse    everything at tiny sizes, without a device
    --dry-run     lists the stages and their limits and does nothing
    --only STAGE  leaves out the others; may be given more than once

It needs torch, triton and pytest on the path; no registry and no installed project. What is not
installed, open_clip say, is left out or replaced, and the table says so. It leaves in DIR a JSON a
stage, table.md, which is renewed after each stage, and log.txt.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benches.gpu.context import read_stage
from benches.gpu.schedule import MINUTES, STAGES, Run, Stage


def arguments(argv: Sequence[str] | None, stages: Sequence[Stage]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benches.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="for the results")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="of everything together")
    parser.add_argument("--resume", action="store_true", help="do what is missing in DIR")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes, no device")
    parser.add_argument("--dry-run", action="store_true", help="list the stages, do nothing")
    names = [stage.name for stage in stages]
    parser.add_argument("--only", choices=names, action="append", help="leave out the others")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None, stages: Sequence[Stage] = STAGES) -> int:
    """Returns 0 if all is well, 1 if something failed or was cut, 2 if nothing could start."""
    options = arguments(argv, stages)
    chosen = [stage for stage in stages if not options.only or stage.name in options.only]
    run = Run(options.out, options.minutes, options.resume, options.rehearse)
    if options.dry_run:
        for stage in chosen:
            print(f"{stage.name}: at most {stage.limit(options.rehearse):.0f} s; {stage.title}")
        total = sum(stage.limit(options.rehearse) for stage in chosen)
        print(f"together: at most {min(total, 60 * options.minutes):.0f} s")
        return 0
    trouble = _trouble(run, stages)
    if trouble:
        print(f"benches.gpu: {trouble}", file=sys.stderr)
        return 2
    run = Run(options.out.resolve(), options.minutes, options.resume, options.rehearse)
    return 0 if run.stages(stages, chosen) else 1


def _trouble(run: Run, stages: Sequence[Stage]) -> str:
    """Why nothing can start; empty if it can."""
    import torch

    if not run.rehearse and not torch.cuda.is_available():
        return "a device must be there, got none; --rehearse runs without, `make bench` on the CPU"
    own = [*(f"{stage.name}.json" for stage in stages), "table.md", "log.txt"]
    if not run.resume and any((run.out / name).exists() for name in own):
        return f"--out must hold no results yet, got {run.out} with some; add --resume to go on"
    results = (read_stage(run.out / f"{stage.name}.json") for stage in stages)
    if any(result.machine.get("rehearsed", run.rehearse) != run.rehearse for result in results):
        return f"--out must hold no rehearsal beside measurements, got {run.out}; name another"
    return ""


if __name__ == "__main__":
    sys.exit(main())
