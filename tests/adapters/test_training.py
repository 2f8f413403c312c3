"""Adapters in the training loop: with optimizers that prune them, on pretrained folders, in bfloat16, over a mesh."""

import dataclasses
import shutil

import numpy as np
import pytest

from llmjax.adapters import AdaLoRA, Adapted, GatedLoRA, LoRA
from llmjax.config import validate
from llmjax.data import Synthetic
from llmjax.data.tasks.copying import Copying
from llmjax.models.pretrained import FromPretrained
from llmjax.nn.model import flat
from llmjax.parallel.mesh import MeshConfig
from llmjax.quant.quantised import Quantised
from llmjax.train import checkpoint
from llmjax.train.log import read_metrics
from llmjax.train.loop import fit
from llmjax.train.optimizers import AdamW, GatedAdamW, RankBudgetAdamW
from llmjax.train.precision import Precision
from llmjax.train.schedules import Constant
from llmjax.train.state import plan
from tests.evidence import evidence
from tests.models.golden import FOLDER
from tests.train.tiny import differing, tiny

pytestmark = pytest.mark.adapters

SCHEDULE = Constant(learning_rate=3e-3)
BUDGET = RankBudgetAdamW(schedule=SCHEDULE, rank=1, start=2, until=8, every=2)


def run(experiment, folder):
    """The last state of a run in `folder`."""
    fit(experiment, folder)
    layout = plan(experiment.model, experiment.optimizer, experiment.train, experiment.mesh.build())
    return checkpoint.newest(folder, print).state(layout.abstract)


@evidence(
    "G12",
    oracle="the paper's budget: rank values for each matrix are left, all others zero",
    code="llmjax.adapters.adalora",
)
def test_directions_are_cut_in_a_run(tmp_path, evidence):
    """At its end `rank` values a matrix are left in all; a run that goes on ends like one that was not stopped."""
    start = tiny()
    model = Adapted(base=start.model, adapters=(AdaLoRA(rank=4),))
    experiment = dataclasses.replace(start, model=model, optimizer=BUDGET)
    whole = run(experiment, tmp_path)
    values = [x for path, x in flat(whole.params).items() if path.endswith("singular")]
    matrices = sum(x.size // x.shape[-1] for x in values)
    evidence.record(abs(sum(np.count_nonzero(x) for x in values) - BUDGET.rank * matrices), 0)
    shutil.rmtree(checkpoint.place(tmp_path, experiment.train.steps))
    assert differing(run(experiment, tmp_path), whole) == 0


def test_gates_close_in_a_run(tmp_path):
    """Under a penalty that nothing holds up against all gates close, and the model is the base again."""
    start = tiny()
    model = Adapted(base=start.model, adapters=(GatedLoRA(rank=2),))
    optimizer = GatedAdamW(schedule=SCHEDULE, strength=1e3, warmup=1, gate_rate=100.0)
    experiment = dataclasses.replace(start, model=model, optimizer=optimizer)
    whole = run(experiment, tmp_path)
    assert not any(np.any(x) for path, x in flat(whole.params).items() if path.endswith("gate"))
    shutil.rmtree(checkpoint.place(tmp_path, experiment.train.steps))
    assert differing(run(experiment, tmp_path), whole) == 0


def pretrained(folder, quantised=False, compute="float32", mesh=MeshConfig()):
    """The held-out losses of LoRA on the golden LLaMA, which learns to copy, and the state at the end."""
    base = FromPretrained(str(FOLDER / "llama"))
    start = tiny(eval_every=6, precision=Precision(compute=compute))
    experiment = dataclasses.replace(
        start,
        model=Adapted(base=Quantised(base=base) if quantised else base, adapters=(LoRA(rank=2),)),
        data=Synthetic(task=Copying(letters=8), length=16, eval_rows=8),
        optimizer=AdamW(schedule=Constant(learning_rate=1e-2)),
        mesh=mesh,
    )
    validate(experiment)
    state = run(experiment, folder)
    return [line["val_loss"] for line in read_metrics(folder) if "val_loss" in line], state


@evidence("G01", oracle="the same run on one device", code="llmjax.adapters.adapted")
@pytest.mark.devices(4)
@pytest.mark.parametrize("quantised", [False, True])
def test_a_pretrained_folder_is_tuned_on_any_mesh(tmp_path, quantised, evidence):
    """Four devices end as one does (1e-4 after 12 updates of Adam), and the folder's tensors are what they were."""
    one, state = pretrained(tmp_path / "one", quantised)
    many, spread = pretrained(tmp_path / "many", quantised, mesh=MeshConfig(fsdp=2, tensor=2))
    assert one[-1] < one[0]
    evidence.record(max(abs(a / b - 1) for a, b in zip(one, many, strict=True)), 1e-4)
    assert differing(spread.frozen, state.frozen) == 0
    if not quantised:
        folder = flat(FromPretrained(str(FOLDER / "llama")).init(None))
        for path, x in flat(state.frozen).items():
            np.testing.assert_array_equal(x, np.asarray(folder[path]))


def test_bfloat16_learns_as_float32_does(tmp_path):
    """Products in bfloat16 (8 bits): the losses agree to a percent."""
    plain, _ = pretrained(tmp_path / "plain")
    mixed, state = pretrained(tmp_path / "mixed", compute="bfloat16")
    np.testing.assert_allclose(mixed, plain, rtol=1e-2)
    assert {x.dtype for x in flat(state.params).values()} == {np.dtype("float32")}
