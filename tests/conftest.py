"""What holds for every test: seeds, poisoned memory, Triton's interpreter, hypothesis' profile.

- Seeds are set before each test, so that a test's outcome does not depend on its neighbours.
- `torch.empty` and its relatives hand out NaN (integers: the largest value, bool: True), so that a
  kernel that reads what it never wrote cannot pass by luck.
- Without a GPU, Triton kernels run in Triton's interpreter: their launchers then take CPU tensors.
  Tests that compile ahead of time start a subprocess with `TRITON_INTERPRET=0`.
- cuDNN multiplies float32 in TF32 unless it is told not to, which no float64 oracle forgives.
- Everything under tests/gpu carries the marker `gpu` and is skipped where there is no device.
"""

import ast
import functools
import importlib.util
import os
import random
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import hypothesis
import pytest
import torch
import torch.utils._device

from tests.interpreter import use_interpreter
from tests.library_defaults import LibraryDefaults

HAS_GPU = torch.cuda.is_available()
torch.backends.cudnn.allow_tf32 = False

if not HAS_GPU:
    use_interpreter()

TESTS = Path(__file__).parent
GPU_TESTS = TESTS / "gpu"


@functools.cache
def _absent_packages(path: Path) -> frozenset[str]:
    """What a file of tests imports at its top and this environment, a borrowed GPU, say, lacks.

    What other files of tests import for it counts too.
    """
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    packages = {name.split(".")[0] for name in names}
    absent = {name for name in packages if importlib.util.find_spec(name) is None}
    own = (TESTS.parent / f"{name.replace('.', '/')}.py" for name in names if "tests." in name)
    return frozenset(absent.union(*(_absent_packages(each) for each in own if each.exists())))


LEFT_OUT = {
    path: sorted(absent)
    for path in sorted(TESTS.rglob("*.py"))
    if path != Path(__file__) and (absent := _absent_packages(path))
}
collect_ignore = [str(path.relative_to(TESTS)) for path in LEFT_OUT]


def pytest_report_header() -> list[str]:
    return [f"left out: {path.name} needs {', '.join(names)}" for path, names in LEFT_OUT.items()]


# Examples are derived from the test itself: a failure found once is found every time.
hypothesis.settings.register_profile(
    "talos", deadline=None, derandomize=True, max_examples=50, print_blob=True
)
hypothesis.settings.load_profile("talos")

# `with torch.device(...)` caches the set of the real constructors; fill it before they are wrapped.
torch.utils._device._device_constructors()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="run two cases of each test only")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(GPU_TESTS):
            item.add_marker(pytest.mark.gpu)
    if config.getoption("--quick"):
        cases: dict[str, list[pytest.Item]] = {}
        for item in items:
            cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
        # The first case and one from the middle: often another dtype or encoding.
        kept = {item for each in cases.values() for item in (each[0], each[len(each) // 2])}
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = [item for item in items if item in kept]


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is not None and not HAS_GPU:
        pytest.skip("needs a CUDA or HIP device")


def poison_(tensor: torch.Tensor) -> torch.Tensor:
    """Overwrites uninitialised memory with what no test expects."""
    with torch.no_grad():
        if tensor.dtype == torch.bool:
            return tensor.fill_(True)
        if tensor.is_floating_point() or tensor.is_complex():
            return tensor.fill_(float("nan"))
        return tensor.fill_(torch.iinfo(tensor.dtype).max)


def poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(allocate)
    def wrapper(*args: object, **kwargs: object) -> torch.Tensor:
        tensor = allocate(*args, **kwargs)
        return tensor if tensor.is_meta else poison_(tensor)

    return wrapper


@pytest.fixture(autouse=True)
def poison_uninitialised_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
    for name in ("new_empty", "new_empty_strided"):
        monkeypatch.setattr(torch.Tensor, name, poisoned(getattr(torch.Tensor, name)))


@pytest.fixture(autouse=True)
def seeds() -> None:
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def library_defaults() -> Iterator[None]:
    """Other defaults of torch for the library, where the environment names one."""
    name = os.environ.get("TALOS_LIBRARY_DEFAULTS")
    with LibraryDefaults(name) if name else nullcontext():
        yield


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Every device of this machine in turn; a test that takes it runs once on each."""
    if request.param == "cuda" and not HAS_GPU:
        pytest.skip("needs a CUDA or HIP device")
    return torch.device(request.param)
