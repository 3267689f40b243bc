"""What the records of each stage must hold: by the pattern of a key, the fields and their types."""

from collections.abc import Mapping
from fnmatch import fnmatchcase

from benches.gpu.context import DONE, FAILED, LATE, RUNNING, StageResult

NUMBER = (int, float)
OPTIONAL = (int, float, type(None))
TIMED = {"seconds": NUMBER, "spread": NUMBER}
TESTS = {
    "passed": int,
    "failed": int,
    "skipped": int,
    "by_file": dict,
    "names": list,
    "ended": bool,
}

KERNEL = TIMED | {"how": str}
MOVED = {"bytes_moved": int, "bytes_per_second": NUMBER, "share": OPTIONAL}
PRODUCT = {"flops": int, "flops_per_second": NUMBER, "matrix_share": OPTIONAL}

Fields = Mapping[str, type | tuple[type, ...]]

SCHEMAS: Mapping[str, Mapping[str, Fields]] = {
    "ceilings": {
        "device": {"name": str, "packages": dict, "cores": int, "driver": (dict, type(None))},
        "copy": TIMED | {"bytes_moved": int, "bytes_per_second": NUMBER},
        "bf16": TIMED | {"flops": int, "flops_per_second": NUMBER},
        "tf32": TIMED | {"flops": int, "flops_per_second": NUMBER},
        "fp32": TIMED | {"flops": int, "flops_per_second": NUMBER},
        "csrc": {"built": bool, "serves": bool, "seconds": NUMBER},
    },
    "agreement": {
        "tests": TESTS,
        "no host sync, *": {"operations": list},
        "captured step, *": {"replays": int},
        "side stream, *": {"iterations": int},
        "launches, *": {"launches": dict},
    },
    "step": {
        "*": TIMED
        | {"shape": str, "density": NUMBER, "form": str, "how": str, "share": OPTIONAL}
        | {"bytes_moved": int, "bytes_per_second": NUMBER, "state_bytes": int},
    },
    "methods": {
        "*, *": {"model": str, "batch": int, "form": str, "title": str, "spreads": list}
        | dict.fromkeys(("forward_backward", "optimizer", "total", "loss"), NUMBER)
        | {"peak_bytes": int, "memory": dict, "launches": int, "bytes_moved": OPTIONAL}
        | {"bytes_per_second": OPTIONAL, "share": OPTIONAL},
    },
    "scoring": {
        "fisher_diag_*": KERNEL | PRODUCT,
        "sddmm_*": KERNEL | PRODUCT | MOVED | {"samples": int, "tokens": int},
        "*, * batch": TIMED | {"samples": int, "samples_per_second": NUMBER, "peak_bytes": int},
        "calibration": {"model": str, "samples": int, "rounds": int, "seconds": NUMBER}
        | {"extrapolated": bool, "batches_run": int},
        "*": KERNEL | MOVED,
    },
    "rest": {
        "counters": {"readable": bool, "reason": (str, type(None)), "kernels": dict},
        "memory checker": {"readable": bool, "reason": (str, type(None))},
        "border, *": TIMED | {"bytes_moved": int},
        "chunk of *": {"seconds": NUMBER},
        "other tests": TESTS,
        "* = *": TIMED,
    },
}


def problems(stage: str, result: StageResult) -> list[str]:
    """What a stage's result lacks; every record must match a pattern, the first one counts.

    One that says why it was left out says nothing else.
    """
    found = []
    for key, record in result.records.items():
        if record["status"] not in {DONE, FAILED, RUNNING, LATE}:
            found.append(f"{stage}, {key}: status {record['status']}")
        if record["status"] != DONE or "left_out" in record:
            continue
        fields = next((f for p, f in SCHEMAS[stage].items() if fnmatchcase(key, p)), None)
        if fields is None:
            found.append(f"{stage}, {key}: no pattern of the schema")
            continue
        for name, kind in fields.items():
            if name not in record or not isinstance(record[name], kind):
                found.append(f"{stage}, {key}: {name} is {record.get(name)!r}")
    return found
