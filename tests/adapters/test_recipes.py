"""The small variants of the fine-tuning recipes: they train, and what they do not train stays."""

import time
from pathlib import Path

import pytest

from llmjax.experiment import load_experiment
from llmjax.train.log import read_metrics
from llmjax.train.loop import fit

FOLDER = Path(__file__).parents[2] / "experiments" / "finetune"
SMALL = (
    "compare.py:tiny",
    "compare.py:tiny_full",
    "compare.py:tiny_lora",
    "compare.py:tiny_prompt",
    "llama3_8b.py:tiny",
)


@pytest.mark.adapters
@pytest.mark.parametrize("variant", SMALL)
def test_small_variants_learn_in_a_minute(variant, tmp_path, monkeypatch):
    """Each in under a minute of this process' time, data and compilation included; the loss falls."""
    monkeypatch.setenv("LLMJAX_CACHE", str(tmp_path / "cache"))
    start = time.process_time()
    fit(load_experiment(str(FOLDER / variant)), tmp_path / "run")
    assert time.process_time() - start < 60
    losses = [line["loss"] for line in read_metrics(tmp_path / "run") if "loss" in line]
    assert losses[-1] < losses[0]
