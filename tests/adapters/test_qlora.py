"""Adapters on quantised models: the function, the gradients and the bytes of the same model with dense matrices."""

import dataclasses
import shutil
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from llmjax.adapters import Adapted, LoRA
from llmjax.config import ConfigError, validate
from llmjax.models.llama import llama2
from llmjax.nn.model import flat, merged, split, unflat
from llmjax.nn.stored import Stored
from llmjax.parallel.mesh import MeshConfig
from llmjax.plan.one_device import activation_bytes, nbytes
from llmjax.quant.gptq import GPTQ
from llmjax.quant.nf4 import NF4
from llmjax.quant.quantised import Quantised
from llmjax.quant.quantize import Quantize
from llmjax.train import checkpoint
from llmjax.train.loop import fit
from llmjax.train.optimizers import AdamW
from llmjax.train.precision import dtypes
from llmjax.train.schedules import Constant
from llmjax.train.state import plan
from llmjax.train.step import Step, apply_of
from tests.adapters.cases import MODELS, base_params, logits_of, shaken
from tests.evidence import evidence
from tests.train.tiny import differing, tiny

models = pytest.mark.parametrize("kind", ["attention", pytest.param("mamba and experts", marks=pytest.mark.adapters)])
NF4_DOUBLE = Quantize(format=NF4(block=4, double=True))


def qlora(base, **fields):
    """LoRA on a quantised base."""
    return Adapted(base=Quantised(base=base, quantize=NF4_DOUBLE), adapters=(LoRA(rank=2, **fields),))


@cache
def made(kind):
    """A quantised model with adapters that change something, and the same with dense matrices."""
    model = qlora(MODELS[kind])
    packed = model.base.init(jax.random.key(0), base_params(MODELS[kind]))
    params = shaken(model, meta.unbox(jax.jit(model.completed)(packed, jax.random.key(1))))
    dense = unflat({path: x.dense() if isinstance(x, Stored) else x for path, x in flat(params).items()})
    return model, params, dense


def relative(mine, theirs):
    """Largest difference over the largest value."""
    return float(np.abs(mine - theirs).max() / np.abs(theirs).max())


@pytest.mark.adapters
@evidence(
    "G35", oracle="the model with the dequantised matrices, dense: outputs and gradients", code="llmjax.quant.quantised"
)
@models
def test_it_is_the_model_of_the_dequantised_matrices(kind, evidence):
    """Logits and the gradients of the adapters: 1e-5, sums in another order."""
    model, params, dense = made(kind)
    evidence.record(relative(logits_of(model)(params), logits_of(model)(dense)), 1e-5)
    trained, frozen = split(params, model.trains)
    _, dense_frozen = split(dense, model.trains)

    def gradients(frozen):
        return flat(jax.grad(lambda t: jnp.sum(jnp.sin(logits_of(model)(merged(t, frozen)))))(trained))

    ours, theirs = gradients(frozen), gradients(dense_frozen)
    for path in theirs:
        evidence.record(relative(ours[path], theirs[path]), 2e-5)


@pytest.mark.adapters
@models
def test_all_linear_layers_are_packed(kind):
    """Every adapted matrix is stored in half a byte a weight and its scales."""
    model, params, _ = made(kind)
    leaves = flat(params)
    for path, p in model.adapters[0].found(model.base).items():
        stored = leaves[f"{path}/{p.leaf}"]
        assert isinstance(stored, Stored)
        assert stored.codes.nbytes <= np.prod(stored.shape) / 2 + 8 * stored.shape[0]


@pytest.mark.adapters
def test_the_backward_pass_keeps_no_dense_matrix():
    """What is kept for it beside the codes does not grow with the matrices: they are decoded again."""
    start = tiny()
    kept = {}
    for name, model in (("dense", start.model), ("packed", Quantised(base=start.model, quantize=NF4_DOUBLE))):
        whole = Adapted(base=model, adapters=(LoRA(rank=2),))
        layout = plan(whole, start.optimizer, start.train, MeshConfig().build())
        step = Step(apply_of(whole.build()), start.objective, layout.optimizer, start.train)
        rows = {k: jax.ShapeDtypeStruct(x.shape, x.dtype) for k, x in start.data.empty(2).items()}
        kept[name] = activation_bytes(step, layout.abstract, rows)
    matrices = nbytes([x for path, x in flat(start.model.abstract()).items() if "/kernel" in path])
    assert kept["packed"] - kept["dense"] < 0.2 * matrices


@pytest.mark.adapters
@evidence("G37", oracle="the frozen base's bytes, and the uninterrupted run's", code="llmjax.quant.quantised")
@evidence(
    "G36",
    oracle="dtypes by path: codes 8 bits, scales and norms float32, what trains float32",
    code="llmjax.adapters.adapted",
)
def test_training_on_four_bits(tmp_path, evidence):
    """The loss falls, no bit of the base changes, and an interrupted run ends like an uninterrupted one."""
    start = tiny({"optimizer": AdamW(schedule=Constant(learning_rate=1e-2))})
    model = Adapted(base=Quantised(base=start.model), adapters=(LoRA(rank=4),))
    experiment = dataclasses.replace(start, model=model)
    layout = plan(model, experiment.optimizer, experiment.train, experiment.mesh.build())
    before = layout.init(0)
    kinds = dtypes(before.model_params)
    expected = {"codes": "uint8", "absmax": "float32", "mean": "float32", "scale": "float32", "a": "float32"}
    wrong = [path for path, kind in kinds.items() if expected.get(path.rpartition("/")[2], kind) != kind]
    evidence.record(len(wrong), 0)
    result = fit(experiment, tmp_path / "whole")
    whole = checkpoint.newest(tmp_path / "whole", print).state(layout.abstract)
    assert result["val_loss"] < 5.6 - 0.1
    evidence.record(differing(whole.frozen, before.frozen), 0)
    shutil.rmtree(checkpoint.place(tmp_path / "whole", experiment.train.steps))
    fit(experiment, tmp_path / "whole")
    evidence.record(differing(checkpoint.newest(tmp_path / "whole", print).state(layout.abstract), whole), 0)


def test_seven_billion_parameters_in_four_bits():
    """Llama 2 7B in NF4 with double quantisation, scales included, tables and norms in bfloat16: at most 3.9 GB."""
    model = Quantised(base=llama2("7B"), quantize=Quantize(rest="bfloat16"))
    assert model.num_params() == 6_738_415_616
    assert nbytes(model.abstract()) <= 3.9e9


def test_methods_that_need_data_are_refused():
    """GPTQ cannot be a part of an experiment: it must see data first."""
    with pytest.raises(ConfigError, match="quantize.method.*must see data first"):
        validate(Quantised(base=MODELS["attention"], quantize=Quantize(method=GPTQ())))


def test_devices_share_codes_and_scales():
    """The names of a matrix's axes are those of its codes; layers and experts come first."""
    names = flat(qlora(MODELS["mamba and experts"]).base.logical_axes())
    experts = next(x for path, x in names.items() if "/experts/" in path and "up" in path)
    assert tuple(experts.codes)[:2] == ("layers", "experts")
