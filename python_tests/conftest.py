"""Shared fixtures: the devices under test, tolerances, seeded inputs."""

import gc
import os
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import postgres_server
import pytest
import torch
from sandbox_cases import FAST, WHY_NOT
from tolerances import GRAD_TOLERANCE as GRAD_TOLERANCE
from tolerances import LOGPROB_TOLERANCE as LOGPROB_TOLERANCE
from tolerances import logprob_error as logprob_error
from tolerances import relative_error as relative_error
from torch import Tensor

import spo_ext
from spo_ext.sandbox import Sandbox

DTYPES = list(LOGPROB_TOLERANCE)


# PyTorch's cache of compiled graphs does not know when the schema of an operator has changed.
_SCHEMAS = Path(__file__).parent.parent / "csrc" / "spo_ops.cpp"
if _SCHEMAS.exists():
    os.environ.setdefault(
        "TORCHINDUCTOR_CACHE_DIR",
        f"{tempfile.gettempdir()}/spo_ext-inductor-{zlib.crc32(_SCHEMAS.read_bytes()):08x}",
    )


def why_no_cuda() -> str | None:
    if not spo_ext.build_info()["cuda_toolkit"]:
        return "this build of spo_ext has no CUDA kernels"
    return None if torch.cuda.is_available() else "torch sees no CUDA GPU"


WHY_NO_CUDA = why_no_cuda()


# How long an example takes says something of the machine: others may work on it.
hypothesis.settings.register_profile(
    "spo_ext", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("spo_ext")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "cuda: runs on a GPU, and is skipped without one")
    config.addinivalue_line("markers", "cpu_only(reason): has no CUDA variant")


# Begun first, so that none of them is left for one process at the end.
LONG = (
    "test_cuda_emulation_sparse test_bring_your_own test_cuda_emulation_head test_gpu_calls "
    "test_trainer_processes test_cuda_emulation_scan test_end_to_end test_trainer test_store_away "
    "test_contests test_trainer_options test_rollout_served test_trainer_resume test_invariance"
).split()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {name: i for i, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONG)))
    items[:] = [
        item
        for item in items
        if not (item.get_closest_marker("cuda") and item.get_closest_marker("cpu_only"))
    ]


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()  # trainers collect garbage, and would search all that was imported each time


def pytest_runtest_setup(item: pytest.Item) -> None:
    if WHY_NO_CUDA is not None and item.get_closest_marker("cuda"):
        pytest.skip(WHY_NO_CUDA)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """A line each, since a quiet run hides the reasons of its skips."""
    skipped = terminalreporter.stats.get("skipped", [])
    for what, why_not in (("CUDA", WHY_NO_CUDA), ("PostgreSQL", postgres_server.missing())):
        count = sum(why_not is not None and why_not in str(r.longrepr) for r in skipped)
        if count:
            terminalreporter.line(f"{count} {what} tests skipped: {why_not}")


@pytest.fixture
def on_cuda() -> Iterator[None]:
    """New tensors are on the GPU, so that a test says nothing about devices."""
    torch.set_default_device("cuda")
    yield
    torch.set_default_device(None)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> str:
    """Where a test's new tensors are. The CPU is the default already; setting it would only slow
    every call down."""
    if request.param == "cuda":
        request.getfixturevalue("on_cuda")
    return str(request.param)


def moved(value: Any, device: str | torch.device) -> Any:
    """Every tensor in nested lists, tuples and dicts on `device`, differentiably."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: moved(item, device) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(moved(item, device) for item in value)
    return value


class _CpuEager:
    """spo_ext.eager computed on the CPU, the one truth for every device. Results and gradients
    return to the device of the arguments."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        function = getattr(spo_ext.eager, name)

        def call(*args: Any, **options: Any) -> Any:
            home = next(a.device for a in args if isinstance(a, Tensor))
            with torch.device("cpu"):
                out = function(*moved(args, "cpu"), **moved(options, "cpu"))
            return moved(out, home)

        return call


eager = _CpuEager()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(20)


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    if WHY_NOT["bwrap"] is not None:
        pytest.skip(f"bubblewrap does not work here: {WHY_NOT['bwrap']}")
    with Sandbox(workers=2, level="bwrap", limits=FAST) as sandbox:
        yield sandbox


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """The URL of a server of our own, without a database."""
    why_not = postgres_server.missing()
    if why_not is not None:
        pytest.skip(why_not)
    with postgres_server.server() as server:
        yield server.url


@pytest.fixture(params=["sqlite", "postgresql"])
def store_target(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """What TrajectoryStore opens: a new file, or empty tables on the server."""
    if request.param == "sqlite":
        return str(tmp_path / "store.db")
    url = request.getfixturevalue("postgres")
    return postgres_server.new_schema(url)


@pytest.fixture
def store(store_target: str) -> Iterator[Any]:
    from spo_ext.store import TrajectoryStore

    with TrajectoryStore(store_target) as opened:
        yield opened


def doubled(tensor: Tensor) -> Tensor:
    """The same (rounded) numbers as a float64 leaf."""
    return tensor.detach().double().requires_grad_(tensor.requires_grad)


def head_inputs(
    tokens: int, vocabulary: int, depth: int, dtype: torch.dtype, scale: float = 2.0
) -> tuple[Tensor, Tensor, Tensor]:
    """hidden [N, d], weight [V, d] (leaves) and targets [N]; logits have standard deviation
    `scale`."""
    hidden = torch.randn(tokens, depth).to(dtype).requires_grad_()
    weight = (torch.randn(vocabulary, depth) * scale / depth**0.5).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(vocabulary, (tokens,))
