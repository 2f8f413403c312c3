"""What every test process shares: where compiled code is cached, how many devices there are, and how evidence is kept.

One device is the default. A test (or a module, through `pytestmark`) that needs more says `@pytest.mark.devices(8)`:
the CPU backend is then started again with that many fake devices, in the same process. Eight devices for everybody
would make every step slower and every default mesh eight wide. A module that keeps arrays in module fixtures is marked
as a whole, because arrays do not survive the new start.
"""

import importlib.metadata
import importlib.util
import os
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from tests.evidence import Recorder, record_path, write_record

ROOT = Path(__file__).resolve().parent.parent
MEMORY_LIMIT = 16 * 2**30
EVIDENCE = pytest.StashKey[Recorder]()
PASSED = pytest.StashKey[bool]()
SUITES = ("slow", "parity", "hardware", "multiprocess", "matrix", "mixers")

# The same cases in every run: a suite that passes goes on passing until the code changes.
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
hypothesis.settings.load_profile("repeatable")

# Set before jax is imported anywhere, and inherited by the processes that tests start.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
# What tests cost is compiling, and what they compile runs for milliseconds: LLVM need not optimise it, and the older
# emitters of fusions, which later versions do not have, need a quarter of the time.
FLAGS = ["--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true"]
if importlib.metadata.version("jaxlib").startswith("0.10."):
    FLAGS += ["--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1"]
os.environ.setdefault("XLA_FLAGS", " ".join(FLAGS))
# A CPU multiplies float32 in float32 anyway; what is compiled for absent TPUs must keep the chip's own default.
if os.environ["JAX_PLATFORMS"] != "cpu":
    os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "float32")

# Modules of the parity suite import torch on their first lines; without it they cannot even be collected.
collect_ignore_glob = [] if importlib.util.find_spec("torch") else ["parity/*"]


def pytest_configure(config: pytest.Config) -> None:
    """Cap the memory of a test process: a compiler that runs away ends its own process, not the machine."""
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = MEMORY_LIMIT if hard == resource.RLIM_INFINITY else min(MEMORY_LIMIT, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of a suite's folder with the suite's name; put tests with the same number of devices together."""
    for item in items:
        folder = item.path.relative_to(ROOT / "tests").parts[0]
        if folder in SUITES:
            item.add_marker(folder)
        if item.get_closest_marker("evidence") and "evidence" not in item.fixturenames:
            raise pytest.UsageError(f"{item.nodeid} is marked as evidence but does not take the `evidence` fixture")
    items.sort(key=_devices)


def _devices(item: pytest.Item) -> int:
    marker = item.get_closest_marker("devices")
    return marker.args[0] if marker else 1


@pytest.fixture(autouse=True)
def devices(request: pytest.FixtureRequest) -> int:
    """The number of (fake) CPU devices of this test; the backend starts again if the last test had another number."""
    wanted = _devices(request.node)
    running = _running_devices()
    if os.environ["JAX_PLATFORMS"] == "cpu" and wanted != (running or 1):
        import jax
        from jax.extend.backend import clear_backends

        clear_backends()
        jax.config.update("jax_num_cpu_devices", wanted)
    return wanted


def _running_devices() -> int | None:
    """The number of devices of the backend, or None where no test of this process has started one."""
    bridge = sys.modules.get("jax._src.xla_bridge")
    if bridge is None or not bridge.backends_are_initialized():
        return None
    return sys.modules["jax"].device_count()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Iterator[None]:
    """Remember for the `evidence` fixture whether the test's own part passed."""
    report = yield
    if report.when == "call":
        item.stash[PASSED] = report.passed
    return report


@pytest.fixture
def evidence(request: pytest.FixtureRequest) -> Iterator[Recorder]:
    """`evidence.record(error, tolerance)`: asserts, keeps the worst, and writes it once the test has passed."""
    folder = ROOT / ".evidence"
    item = request.node
    marks = list(item.iter_markers("evidence"))
    assert marks, "take the `evidence` fixture only in a test marked with @evidence(row, oracle=..., code=...)"
    record_path(folder, item.nodeid).unlink(missing_ok=True)
    recorder = Recorder()
    yield recorder
    if item.stash.get(PASSED, False):
        assert recorder.error is not None, "marked as evidence, but nothing was recorded: call evidence.record"
        write_record(folder, item.nodeid, marks, recorder)
