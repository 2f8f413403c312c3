"""The README's first experiment is what it says: it loads, it is valid, and it is at most 15 lines."""

import re
import runpy
import shlex
from pathlib import Path

import pytest

from llmjax.experiment import load_experiment

ROOT = Path(__file__).resolve().parents[1]


def snippet() -> str:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    return code


def test_the_first_experiment_loads(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(snippet())
    experiment = load_experiment(str(path), ["--train.steps=400"])
    assert experiment.train.steps == 400
    assert experiment.model.num_params() > 0
    assert len([line for line in snippet().splitlines() if line.strip()]) <= 15


def test_every_override_of_the_readme_is_taken():
    """Path, type and value of each, on the experiment of the first lines."""
    lines = re.findall(r"^llmjax (?:train|show|eval|plan) \S+ .*", (ROOT / "README.md").read_text(), re.MULTILINE)
    words = {word for line in lines for word in shlex.split(line, comments=True)}
    overrides = sorted(word for word in words if re.match(r"--(model|train|data|optimizer|mesh)\.", word))
    assert overrides
    for override in overrides:
        load_experiment(str(ROOT / "experiments" / "tiny.py"), [override])


@pytest.mark.parametrize("name", ["parallelism.md", "finetuning.md"])
def test_examples_of_the_docs_run(name, tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / name).read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        (tmp_path / "example.py").write_text(block)
        runpy.run_path(str(tmp_path / "example.py"))
