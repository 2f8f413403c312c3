"""Checkpoints are whole or absent, and trusted only when every byte is as it was written."""

import dataclasses
import errno
import json
import threading

import chex
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from llmjax.config import InputError
from llmjax.parallel.mesh import MeshConfig
from llmjax.train import checkpoint
from llmjax.train.checkpoint import HIDDEN, MANIFEST, META, Writer, place, steps
from llmjax.train.ema import Ema
from llmjax.train.errors import RunError
from llmjax.train.state import plan
from tests.evidence import evidence
from tests.train.tiny import differing, tiny


def planned(changes=None, mesh=None, **train):
    """The plan of a tiny experiment on a mesh."""
    experiment = tiny(changes, **train)
    return plan(experiment.model, experiment.optimizer, experiment.train, (mesh or MeshConfig()).build())


def state_of(planned, seed=0):
    """A state whose every array is different from that of a fresh start."""
    leaves, tree = jax.tree.flatten(planned.abstract)
    draw = np.random.default_rng(seed)
    arrays = [jax.device_put((draw.normal(size=x.shape) * 9).astype(x.dtype), x.sharding) for x in leaves]
    return jax.tree.unflatten(tree, arrays)


def write(run_dir, planned, *at, keep_last=9, keep_best=0, losses=None):
    """Checkpoints at the given steps; the state at step n is `state_of(planned, n)`."""
    writer = Writer(run_dir, keep_last, keep_best)
    for step in at:
        writer.save(step, state_of(planned, step), {"number": step}, (losses or {}).get(step))
    writer.close()


def files(folder):
    """All files of a checkpoint."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def warnings_and_newest(run_dir):
    """The newest intact checkpoint's step (None without) and the warnings on the way to it."""
    lines = []
    found = checkpoint.newest(run_dir, lines.append)
    return (None if found is None else found.step), lines


@evidence("E54", oracle="the arrays that were saved, bit by bit", code="llmjax.train.checkpoint")
def test_round_trip(evidence, tmp_path):
    plans = planned(ema=Ema())
    write(tmp_path, plans, 7)
    found = checkpoint.newest(tmp_path, pytest.fail)
    assert (found.step, found.progress, found.val_loss) == (7, {"number": 7}, None)
    restored = found.state(plans.abstract)
    chex.assert_trees_all_equal_shapes_and_dtypes(restored, plans.abstract)
    evidence.record(differing(restored, state_of(plans, 7)), 0)


@evidence("E55", oracle="orbax StandardCheckpointer", code="llmjax.train.checkpoint")
def test_parameters_load_alone_and_with_plain_orbax(evidence, tmp_path):
    plans = planned()
    write(tmp_path, plans, 3)
    found = checkpoint.newest(tmp_path, pytest.fail)
    expected = state_of(plans, 3).params
    chex.assert_trees_all_equal(found.params(plans.abstract.params), expected)
    with ocp.StandardCheckpointer() as plain:
        theirs = plain.restore(found.path / "arrays" / "params")
    assert jax.tree.structure(theirs) == jax.tree.structure(expected)
    differences = [np.max(np.abs(a - b)) for a, b in zip(*map(jax.tree.leaves, (theirs, expected)), strict=True)]
    evidence.record(max(differences), 0)


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "empty"])
def test_damage_in_any_file_is_seen_and_the_checkpoint_before_is_used(tmp_path, damage):
    plans = planned()
    write(tmp_path, plans, 1, 2)
    for path in files(place(tmp_path, 2)):
        whole = path.read_bytes()
        if damage == "flip":
            middle = len(whole) // 2
            path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :] if whole else b"x")
        elif damage == "truncate":
            path.write_bytes(whole[:-1] if whole else b"x")
        elif damage == "empty":
            path.write_bytes(b"" if whole else b"x")
        else:
            path.unlink()
        step, lines = warnings_and_newest(tmp_path)
        assert step == 1, path
        assert len(lines) == 1
        assert "\n" not in lines[0]
        assert "00000002 is damaged" in lines[0]
        path.write_bytes(whole)
    assert warnings_and_newest(tmp_path) == (2, [])


def test_half_written_checkpoints_are_invisible_and_swept(tmp_path):
    plans = planned()
    write(tmp_path, plans, 1, 2)
    place(tmp_path, 2).rename(place(tmp_path, 2).with_name(f"{HIDDEN}00000002"))
    assert warnings_and_newest(tmp_path) == (1, [])
    Writer(tmp_path, 2, 0)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["00000001"]


def test_without_an_intact_checkpoint_there_is_none(tmp_path):
    assert warnings_and_newest(tmp_path) == (None, [])
    write(tmp_path, planned(), 1)
    (place(tmp_path, 1) / MANIFEST).unlink()
    step, lines = warnings_and_newest(tmp_path)
    assert step is None
    assert len(lines) == 1


def test_the_last_and_the_best_are_kept(tmp_path):
    losses = {1: 3.0, 2: 1.0, 3: 2.0, 4: 5.0, 5: None, 6: 4.0}
    write(tmp_path, planned(), *losses, keep_last=2, keep_best=1, losses=losses)
    assert steps(tmp_path) == [2, 5, 6]
    assert checkpoint.best(tmp_path, pytest.fail).step == 2
    assert checkpoint.newest(tmp_path, pytest.fail).step == 6
    assert not list((tmp_path / "checkpoints").glob(f"{HIDDEN}*"))


def test_a_step_saved_again_replaces_the_old_one(tmp_path):
    plans = planned()
    write(tmp_path, plans, 5)
    writer = Writer(tmp_path, 2, 0)
    writer.save(5, state_of(plans, 99), {"number": 99}, None)
    writer.close()
    found = checkpoint.newest(tmp_path, pytest.fail)
    chex.assert_trees_all_equal(found.params(plans.abstract.params), state_of(plans, 99).params)


def test_what_comes_after_the_restored_step_is_set_aside(tmp_path):
    write(tmp_path, planned(), 1, 2, 3)
    Writer(tmp_path, 2, 0).set_aside(1)
    assert steps(tmp_path) == [1]
    assert (tmp_path / "checkpoints" / "damaged-00000003").is_dir()


def test_the_state_may_be_donated_while_it_is_being_written(tmp_path):
    plans = planned()
    writer = Writer(tmp_path, 2, 0)
    state, expected = state_of(plans, 1), jax.device_get(jax.tree.map(jnp.copy, state_of(plans, 1)))
    spoil = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 - 1, tree), donate_argnums=0)
    writer.save(1, state, {}, None)
    for _ in range(20):
        state = spoil(state)
    jax.block_until_ready(state)
    writer.close()
    found = checkpoint.newest(tmp_path, pytest.fail)
    chex.assert_trees_all_equal(jax.device_get(found.state(plans.abstract)), expected)


@pytest.mark.devices(8)
@pytest.mark.parametrize(
    ("before", "after"),
    [
        (MeshConfig(), MeshConfig(fsdp=8)),
        (MeshConfig(fsdp=8), MeshConfig()),
        (MeshConfig(fsdp=8), MeshConfig(data=2, fsdp=2)),
    ],
    ids=["1-to-8", "8-to-1", "8-to-4"],
)
def test_a_checkpoint_fits_any_number_of_devices(tmp_path, before, after):
    plans = planned(mesh=before)
    write(tmp_path, plans, 1)
    target = planned(mesh=after)
    restored = checkpoint.newest(tmp_path, pytest.fail).state(target.abstract)
    chex.assert_trees_all_equal(jax.device_get(restored), jax.device_get(state_of(plans, 1)))
    assert jax.tree.all(
        jax.tree.map(lambda x, t: x.sharding.is_equivalent_to(t.sharding, x.ndim), restored, target.abstract)
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.d_model": 64}, r"parameter blocks/0/\S+ is float32\[.*32.*\] there and float32\[.*64.*\] here"),
        ({"model.tied": True}, "holds parameter head/kernel, which this experiment has not"),
    ],
)
def test_another_shape_names_the_parameter(tmp_path, changes, message):
    write(tmp_path, planned(), 1)
    found = checkpoint.newest(tmp_path, pytest.fail)
    other = planned(changes)
    for restore in (lambda: found.params(other.abstract.params), lambda: found.state(other.abstract)):
        with pytest.raises(InputError, match=message):
            restore()


def test_another_optimizer_names_its_state(tmp_path):
    write(tmp_path, planned(), 1)
    found = checkpoint.newest(tmp_path, pytest.fail)
    with pytest.raises(InputError, match="lacks array ema/"):
        found.state(planned(ema=Ema()).abstract)


def _no_space(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def _no_space_in_words(*_, **__):
    # This is how tensorstore says it.
    raise ValueError("RESOURCE_EXHAUSTED: Error writing file [OS error 28: ENOSPC No space left on device]")


@pytest.mark.parametrize("failure", [_no_space, _no_space_in_words])
@pytest.mark.parametrize("where", ["seal", "save"])
def test_a_full_disk_is_one_line_and_leaves_nothing_behind(tmp_path, monkeypatch, failure, where):
    plans = planned()
    write(tmp_path, plans, 1)
    if where == "seal":
        monkeypatch.setattr(checkpoint, "seal", failure)
    else:
        monkeypatch.setattr(ocp.AsyncCheckpointer, "save", failure)
    with pytest.raises(RunError, match=r"^the disk is full: [^\n]*last complete checkpoint is step 1\)[^\n]*$"):
        write(tmp_path, plans, 2)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["00000001"]


def test_the_manifest_lists_every_file_and_is_written_last(tmp_path, monkeypatch):
    plans = planned()
    seen = []

    def look(partial, meta, seal=checkpoint.seal):
        seen.append((threading.current_thread().name, steps(tmp_path)))
        seal(partial, meta)

    monkeypatch.setattr(checkpoint, "seal", look)
    write(tmp_path, plans, 1)
    assert seen == [("checkpoint", [])]
    folder = place(tmp_path, 1)
    listed = json.loads((folder / MANIFEST).read_text())
    assert {str(path.relative_to(folder)) for path in files(folder)} == {*listed, MANIFEST}
    assert META in listed
    assert dataclasses.is_dataclass(checkpoint.verified(folder))
