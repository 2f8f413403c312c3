"""The evidence machinery itself: what is recorded, what is refused, how records merge."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.evidence import Recorder, evidence, merge, page

ROOT = Path(__file__).resolve().parent.parent


def record(row: str, oracle: str, error: float, tolerance: float, code: str = "llmjax.nn") -> dict:
    """One record as a passing test leaves it."""
    mark = {"row": row, "oracle": oracle, "code": code}
    return {"test": "tests/x.py::test_x", "error": error, "tolerance": tolerance, "rows": [mark]}


@pytest.mark.parametrize("row", ["Q01", "A1", "a01", "A011", ""])
def test_unknown_rows_are_refused(row: str) -> None:
    """Row ids are a room's letter and two digits."""
    with pytest.raises(ValueError, match="catalogue row"):
        evidence(row, oracle="jax.nn", code="llmjax.nn")


@pytest.mark.parametrize("code", ["numpy.fft", "llmjax nn", ""])
def test_evidence_is_about_our_code(code: str) -> None:
    """The code a row points to lies in one of our packages."""
    with pytest.raises(ValueError, match="A29"):
        evidence("A29", oracle="jax.nn", code=code)


@pytest.mark.parametrize(
    ("error", "tolerance"), [(2e-6, 1e-6), (float("nan"), 1.0), (float("inf"), 1.0), (-1.0, 1.0), (1e-9, 0.0)]
)
def test_errors_beyond_the_tolerance_fail(error: float, tolerance: float) -> None:
    """Too large, not a number, infinite, negative, or not exact where exactness is asked."""
    with pytest.raises(AssertionError):
        Recorder().record(error, tolerance)


def test_the_record_nearest_to_its_tolerance_is_kept() -> None:
    """0.5e-6 of 1e-6 is nearer than 1e-3 of 1e-2."""
    recorder = Recorder()
    recorder.record(1e-3, 1e-2)
    recorder.record(0.5e-6, 1e-6)
    recorder.record(0.0, 0.0)
    assert (recorder.error, recorder.tolerance) == (0.5e-6, 1e-6)


def test_a_row_lists_all_its_oracles() -> None:
    """Two oracles of a row stand side by side; two tests against one oracle show the worse; rooms keep their order."""
    merged = merge(
        [
            record("B02", "scipy", 0.0, 0.0),
            record("A29", "torch", 1e-7, 1e-6),
            record("A29", "jax.nn", 3e-7, 1e-6),
            record("A29", "jax.nn", 2e-7, 1e-6),
        ]
    )
    assert list(merged) == ["A29", "B02"]
    assert merged["A29"] == {
        "code": "llmjax.nn",
        "oracle": "jax.nn; torch",
        "error": 3e-7,
        "tolerance": 1e-6,
        "checks": [
            {"code": "llmjax.nn", "oracle": "jax.nn", "error": 3e-7, "tolerance": 1e-6},
            {"code": "llmjax.nn", "oracle": "torch", "error": 1e-7, "tolerance": 1e-6},
        ],
    }
    text = page(merged)
    assert "| A29 | `llmjax.nn` | torch | 1e-07 | 1e-06 |" in text
    assert text.index("## A Neural network parts") < text.index("## B State-space")


MODULE = """
import pytest
from tests.evidence import evidence

@evidence("A29", oracle="one", code="llmjax.nn")
@evidence("A30", oracle="one", code="llmjax.nn")
@pytest.mark.parametrize("error", [0.1, 0.2])
def test_good(evidence, error):
    evidence.record(error=error, tolerance=1.0)

@evidence("A31", oracle="two", code="llmjax.nn")
def test_fails_after_recording(evidence):
    evidence.record(error=0.0, tolerance=1.0)
    assert False

@evidence("A32", oracle="three", code="llmjax.nn")
def test_too_far(evidence):
    evidence.record(error=2.0, tolerance=1.0)

@evidence("A33", oracle="four", code="llmjax.nn")
def test_records_nothing(evidence):
    pass
"""


def run_pytest(repository: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a pytest of its own in `repository`, with the project's settings and two workers."""
    command = [sys.executable, "-m", "pytest", "-c", str(repository / "pyproject.toml"), "--rootdir", str(repository)]
    return subprocess.run(
        [*command, *arguments], cwd=repository, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A small repository with our conftest, our evidence module and the tests of `MODULE`."""
    (tmp_path / "tests").mkdir()
    for name in ("pyproject.toml", "tests/__init__.py", "tests/conftest.py", "tests/evidence.py"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    (tmp_path / "tests" / "test_it.py").write_text(MODULE)
    return tmp_path


@pytest.mark.slow
def test_only_passing_tests_leave_a_record(repository: Path) -> None:
    """Two rows from two parameters; nothing from a test that fails, goes beyond its tolerance or records nothing."""
    result = run_pytest(repository)
    for count in ("2 failed", "3 passed", "1 error"):
        assert count in result.stdout, result.stdout
    records = [json.loads(path.read_text()) for path in (repository / ".evidence").glob("*")]
    merged = merge(records)
    assert {row: entry["error"] for row, entry in merged.items()} == {"A29": 0.2, "A30": 0.2}


@pytest.mark.slow
def test_a_record_does_not_outlive_its_test_passing(repository: Path) -> None:
    """What passed once and fails now is no evidence any more."""
    path = repository / "tests" / "test_it.py"
    run_pytest(repository, "-k", "test_good")
    path.write_text(MODULE.replace("error=error, tolerance=1.0", "error=error, tolerance=0.15"))
    run_pytest(repository, "-k", "test_good")
    (left,) = (json.loads(record.read_text()) for record in (repository / ".evidence").glob("*"))
    assert (left["error"], left["tolerance"]) == (0.1, 0.15)


def test_a_marked_test_must_take_the_fixture(repository: Path) -> None:
    """The marker without the fixture would be a claim that nothing measures."""
    (repository / "tests" / "test_it.py").write_text(
        MODULE.replace("def test_records_nothing(evidence)", "def test_records_nothing()")
    )
    result = run_pytest(repository, "-n", "0")
    assert result.returncode != 0
    assert "does not take the `evidence` fixture" in result.stdout + result.stderr
