"""Which tuned entry a call takes, and that every shipped entry says what it is."""

import datetime
import json
from importlib import import_module, resources

import jax.numpy as jnp
import pytest

from pallas_kernels import tuned as tuned_module
from pallas_kernels.chips import CHIPS
from pallas_kernels.tuned import tuned

KEYS = {
    *("kernel", "query_length", "key_length", "head_dim", "value_dim", "dtype", "causal"),
    *("config", "cost", "unit", "source", "date"),
}
KERNELS = {"attention_tpu": "pallas_kernels.attention.tpu", "attention_hopper": "pallas_kernels.attention.hopper"}


def entry(query_length, key_length, block, **changes):
    shape = dict(query_length=query_length, key_length=key_length, head_dim=128, value_dim=128)
    return dict(kernel="k", dtype="bfloat16", causal=True, config={"block": block}, **shape) | changes


@pytest.fixture
def chips(monkeypatch):
    """v5p with entries at 1k, 4k and one cross shape; nothing else."""
    known = {"v5p": (entry(1024, 1024, 1), entry(4096, 4096, 4), entry(1024, 8192, 18))}
    monkeypatch.setattr(tuned_module, "entries", lambda chip: known.get(chip, ()))


def ask(
    query_length, key_length, chip="TPU v5", kernel="k", head_dim=128, value_dim=128, dtype=jnp.bfloat16, causal=True
):
    shapes = [(2, query_length, 8, head_dim), (2, key_length, 4, head_dim), (2, key_length, 4, value_dim)]
    found = tuned(kernel, chip, *shapes, dtype, causal)
    return found and found["block"]


@pytest.mark.parametrize(
    ("lengths", "block"),
    [
        ((1024, 1024), 1),
        ((4096, 4096), 4),
        ((1400, 1400), 1),
        ((2900, 2900), 4),
        ((2048, 2048), 1),
        ((1024, 5000), 18),
        ((131072, 131072), 4),
        ((256, 256), 1),
        ((255, 255), None),
        ((1, 8192), None),
        ((0, 1024), None),
    ],
)
def test_the_nearest_lengths_win(chips, lengths, block):
    """Nearest in octaves; ties go to the shorter; longer calls take the longest; 4 times shorter is the limit."""
    assert ask(*lengths) == block


@pytest.mark.parametrize(
    "change",
    [
        {"chip": "TPU v5 lite"},
        {"chip": "cpu"},
        {"kernel": "other"},
        {"head_dim": 64},
        {"value_dim": 64},
        {"dtype": jnp.float32},
        {"causal": False},
    ],
)
def test_everything_but_the_lengths_must_agree(chips, change):
    assert ask(1024, 1024) == 1
    assert ask(1024, 1024, **change) is None


def test_a_caller_may_change_what_it_gets(chips):
    shapes = [(1, 1024, 1, 128)] * 3
    tuned("k", "TPU v5", *shapes, jnp.bfloat16, True)["block"] = 99
    assert ask(1024, 1024) == 1


def shipped():
    return {chip.name: resources.files("pallas_kernels").joinpath("configs", f"{chip.name}.json") for chip in CHIPS}


@pytest.mark.parametrize("chip", shipped())
def test_shipped_entries_are_complete(chip):
    """Each entry is a config that its kernel takes, for a power-of-two bucket, found on a day by a named means."""
    table = json.loads(shipped()[chip].read_text())
    assert table["chip"] == chip
    places = [
        tuple(e[k] for k in sorted(KEYS - {"config", "cost", "unit", "source", "date"})) for e in table["entries"]
    ]
    assert len(set(places)) == len(places)
    for e in table["entries"]:
        assert set(e) == KEYS
        assert import_module(KERNELS[e["kernel"]]).Config(**e["config"])
        assert all(n & (n - 1) == 0 for n in (e["query_length"], e["key_length"]))
        assert jnp.dtype(e["dtype"]).name == e["dtype"]
        assert e["cost"] > 0
        assert {"estimate": "cycles", "measured": "ms"}[e["source"].split()[0]] == e["unit"]
        assert datetime.date.fromisoformat(e["date"]) <= datetime.date.today() + datetime.timedelta(days=1)
