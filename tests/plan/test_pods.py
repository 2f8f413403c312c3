"""The recipes of experiments/pods: their data can be read as their files say."""

from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models

from llmjax.config import override
from llmjax.data import write_token_shards
from llmjax.experiment import load_experiment

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted(path.name for path in (ROOT / "experiments" / "pods").glob("*.py"))


@pytest.fixture
def tokens(tmp_path):
    """tokens/ with a tokenizer.json of four words, and 64 tokens in each split."""
    vocabulary = {"a": 0, "b": 1, "<s>": 2, "</s>": 3}
    Tokenizer(models.WordLevel(vocabulary, unk_token="a")).save(str(tmp_path / "tokenizer.json"))
    for split in ("train", "validation"):
        write_token_shards(tmp_path / split, [[0, 1] * 32], vocab_size=4, bos_id=2, eos_id=3)
    return tmp_path


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_reads_token_shards_and_their_tokenizer(name, tokens):
    """Rows of the tokens that were written, in the recipe's own Data but for paths and sizes."""
    data = load_experiment(str(ROOT / "experiments" / "pods" / name)).data
    paths = [f"--source.path={tokens}", f"--tokenizer.path={tokens / 'tokenizer.json'}"]
    data = override(data, [*paths, "--length=16", "--batch_size=2"])
    pipeline = data.build(seed=0, cache_dir=tokens / "cache")
    batch = pipeline.batch(0)
    assert batch["tokens"].shape == (2, 16)
    assert set(np.unique(batch["tokens"])) <= {0, 1, 2, 3}
    assert next(pipeline.eval_batches())["tokens"].shape == (2, 16)
