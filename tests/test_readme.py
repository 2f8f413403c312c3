"""The README's first experiment is what it says: it loads, it is valid, and it is at most 15 lines."""

import re
from pathlib import Path

from llmjax.config import leaves
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


def test_every_path_the_readme_overrides_exists():
    experiment = load_experiment(str(ROOT / "experiments" / "tiny.py"))
    paths = re.findall(r"llmjax \w+ \S+ --((?:model|train|data|optimizer)\.[\w.]+)=", (ROOT / "README.md").read_text())
    assert paths
    for path in paths:
        assert path in leaves(experiment) or any(leaf.startswith(path + ".") for leaf in leaves(experiment))
