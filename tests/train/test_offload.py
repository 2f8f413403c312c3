"""Moments that stay in the host's memory change no bit of a run."""

import dataclasses

import jax
import pytest

from llmjax.train import checkpoint
from llmjax.train.loop import fit
from llmjax.train.optimizers import AdamW
from llmjax.train.schedules import Constant
from llmjax.train.state import plan
from tests.train.tiny import differing, tiny


@pytest.mark.adapters
def test_moments_in_host_memory_change_no_bit(tmp_path):
    """The state after an uninterrupted run on the device, and after a resumed one with moments on the host."""
    usual = tiny({"optimizer": AdamW(schedule=Constant(learning_rate=3e-3))})
    paged = dataclasses.replace(usual, train=dataclasses.replace(usual.train, offload_optimizer=True))
    layouts = [plan(e.model, e.optimizer, e.train, e.mesh.build()).abstract for e in (usual, paged)]
    kinds = {x.sharding.memory_kind for x in jax.tree.leaves(layouts[1].opt_state) if x.ndim}
    assert kinds == {"pinned_host"}
    fit(usual, tmp_path / "usual")
    fit(dataclasses.replace(paged, train=dataclasses.replace(paged.train, steps=8)), tmp_path / "paged")
    fit(paged, tmp_path / "paged")
    states = [checkpoint.newest(tmp_path / name, print).state(layouts[0]) for name in ("usual", "paged")]
    assert differing(*states) == 0
