"""The planner's memory for a CPU against what a real step takes of the machine."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from llmjax.plan.process import environment, plan_of
from llmjax.plan.target import parse

ROOT = Path(__file__).resolve().parents[2]
TINY = str(ROOT / "experiments" / "tiny.py")
LARGE = (
    "--model.d_model=512",
    "--model.layers=4",
    "--model.unroll=1",
    "--data.length=512",
    "--data.batch_size=8",
    "--objective.chunk=None",
)
STEP = """
import json, sys
from pathlib import Path
import jax
from llmjax.experiment import load_experiment
from llmjax.plan.program import compile_step
from llmjax.plan.target import parse
from llmjax.train.state import plan

def resident(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

experiment = load_experiment(sys.argv[1], sys.argv[2:])
program = compile_step(experiment, parse("cpu:1"))
layout = plan(experiment.model, experiment.optimizer, experiment.train, program.mesh)
state = jax.block_until_ready(layout.init(0))
batch = experiment.data.empty(experiment.data.batch_size)
batch["positions"] = batch["positions"] * 0 + range(experiment.data.length)
batch["loss_mask"] = batch["loss_mask"] + 1
batch = {name: jax.device_put(x) for name, x in batch.items()}
scalars = [jax.device_put(x) for x in (jax.numpy.float32(1e-3), jax.numpy.int32(0), jax.numpy.uint32(0))]
Path("/proc/self/clear_refs").write_text("5")  # the peak begins again from what is resident now
before = resident("VmRSS")
jax.block_until_ready(program.executable(state, batch, *scalars))
print(json.dumps({"growth": resident("VmHWM") - before}))
"""


@pytest.mark.slow
def test_temporaries_are_what_a_step_adds_to_resident_memory():
    """10 %: the peak of a step of more than 1 GB, read from the kernel, less what was resident before it.

    The state is donated, so that what the step adds are its temporaries and results; allocator and thread stacks are
    the tolerance.
    """
    plan = plan_of(TINY, "cpu:1", LARGE)
    planned = plan["memory"]["temporaries"] + plan["memory"]["results"]
    command = [sys.executable, "-c", STEP, TINY, *LARGE]
    options = dict(capture_output=True, text=True, cwd=ROOT, env=environment(parse("cpu:1")), timeout=600, check=False)
    done = subprocess.run(command, **options)
    assert done.returncode == 0, done.stderr[-2000:]
    growth = json.loads(done.stdout.splitlines()[-1])["growth"]
    assert growth > 2**30
    assert planned == pytest.approx(growth, rel=0.1)
