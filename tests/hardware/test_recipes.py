"""The training steps of recipes, compiled by the real compilers for chips that are not there, one subprocess each."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import json, resource, sys
resource.setrlimit(resource.RLIMIT_DATA, (16 * 2**30,) * 2)
import jax, numpy as np
from llmjax.config import override
from llmjax.experiment import load_experiment
from llmjax.data.packing import empty_batch
from llmjax.parallel.mesh import batch_sharding, replicated
from llmjax.parallel.topology import absent_devices
from llmjax.train.state import plan
from llmjax.train.step import Step, apply_of

experiment = override(load_experiment(sys.argv[1]), sys.argv[3:])
mesh = experiment.mesh.build(absent_devices(sys.argv[2]))
state = plan(experiment.model, experiment.optimizer, experiment.train, mesh)
step = Step(apply_of(experiment.model.build()), experiment.objective, state.optimizer, experiment.train)
batch = {
    name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=batch_sharding(mesh))
    for name, x in empty_batch(experiment.data.batch_size, experiment.data.length).items()
}
scalars = [jax.ShapeDtypeStruct((), t, sharding=replicated(mesh)) for t in (np.float32, np.int32, np.uint32)]
with jax.set_mesh(mesh):
    lowered = jax.jit(step, donate_argnums=0).lower(state.abstract, batch, *scalars)
compiled = lowered.compile()
memory = compiled.memory_analysis()
states = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state.abstract))
print(json.dumps({
    "arguments": memory.argument_size_in_bytes, "temporary": memory.temp_size_in_bytes, "states": states,
    "pallas": "tpu_custom_call" in compiled.as_text(),
}))
"""


def compile_for(topology, *overrides):
    command = [sys.executable, "-c", PROGRAM, str(ROOT / "experiments" / "one_gpu.py"), topology, *overrides]
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}  # the user's compiler
    done = subprocess.run(command, capture_output=True, text=True, timeout=420, cwd=ROOT, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("topology", "memory"), [("h200:1x1x1", 141e9), pytest.param("v5p:2x2x1", 95e9, marks=pytest.mark.long)]
)
def test_one_gpu_recipe_compiles_and_fits(topology, memory):
    """The step compiles for one chip; its arguments hold the state, and all of it fits in the chip's memory."""
    found = compile_for(topology)
    assert found["pallas"] == topology.startswith("v5p")  # attention is the TPU kernel there
    assert found["states"] <= found["arguments"] < 1.1 * found["states"]
    assert found["arguments"] + found["temporary"] < memory


@pytest.mark.long
def test_fsdp_divides_the_state_over_the_chips():
    found = compile_for("v5p:2x2x1", "--mesh.fsdp=4")
    assert found["pallas"]
    assert found["states"] / 4 <= found["arguments"] < 1.1 * found["states"] / 4
