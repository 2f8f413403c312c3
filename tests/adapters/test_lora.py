"""LoRA against its closed forms and the counts of the notes, and training with it."""

import dataclasses
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.adapters import Adapted, LoRA
from llmjax.config import ConfigError, validate
from llmjax.models.gpt2 import gpt2
from llmjax.models.llama import llama1
from llmjax.nn.model import flat, merged, split
from llmjax.train import checkpoint
from llmjax.train.loop import fit
from llmjax.train.optimizers import AdamW
from llmjax.train.schedules import Constant
from llmjax.train.state import plan
from tests.adapters.cases import MODELS, TOKENS, adapted_params, logits_of, shaken
from tests.evidence import evidence
from tests.train.tiny import differing, tiny

BASE = MODELS["attention"]
GPT2_LINEAR = r"/(query|key|value|out|up|down)$"


def added(model, **fields):
    """Parameters that LoRA adds to a model."""
    return Adapted(base=model, adapters=(LoRA(**fields),)).num_params() - model.num_params()


@pytest.mark.adapters
@evidence("G03", oracle="counts of the notes, checked there with peft", code="llmjax.adapters.base")
def test_counts(evidence):
    """Targets by preset and pattern: GPT-2 124M, LLaMA 7B and single matrices."""
    small, large = gpt2("124M"), llama1("7B")
    counts = {
        294_912: added(small, targets="qv"),
        442_368: added(small, targets="(query|key|value)$"),
        811_008: added(small, targets="/(query|value|out|down)$"),
        589_824: added(small, targets="qv", rank=16),
        1_622_016: added(small, targets="/(query|value|out|down)$", rank=16),
        1_179_648: added(small, targets="attention", rank=16),
        2_654_208: added(small, targets="all-linear", rank=16),
        8_388_608: added(large, targets="qv", rank=16),
        16_777_216: added(large, targets="attention", rank=16),
        39_976_960: added(large, targets="all-linear", rank=16),
    }
    for wanted, found in counts.items():
        evidence.record(abs(found - wanted), 0)


@evidence("G02", oracle="gradients in closed form: s A^T x^T g and s x^T g B^T", code="llmjax.adapters.lora")
def test_gradients_of_one_product(evidence):
    """For y = x W + s x A B and a loss <g, y>: dB = s (x A)^T g, dA = s x^T g B^T; W has none."""
    model = Adapted(base=BASE, adapters=(LoRA(rank=2, alpha=6.0, targets="head"),))
    params = shaken(model, adapted_params(model))
    trained, frozen = split(params, model.trains)
    hidden = model.build().apply({"params": params}, TOKENS, method="features")[0].hidden.reshape(-1, 8)
    g = np.random.default_rng(1).normal(size=(12, 11)).astype(np.float32)
    loss = lambda trained: jnp.sum(logits_of(model)(merged(trained, frozen)).reshape(12, 11) * g)
    found = jax.grad(loss)(trained)["head"]["adapters"]["default"]
    own = params["head"]["adapters"]["default"]
    wanted = {"a": 3.0 * hidden.T @ g @ own["b"].T, "b": 3.0 * (hidden @ own["a"]).T @ g}
    for name, theirs in wanted.items():
        evidence.record(float(jnp.abs(found[name] - theirs).max() / jnp.abs(theirs).max()), 2e-6)


def test_the_change_is_of_its_rank():
    """W' - W has exactly `rank` singular values that are not rounding."""
    model = Adapted(base=BASE, adapters=(LoRA(rank=2, targets="qv"),))
    own = flat(shaken(model, adapted_params(model)))
    a, b = (own[f"blocks/0/mixer/query/adapters/default/{leaf}"][0] for leaf in "ab")
    values = np.linalg.svd(np.tensordot(a, b, 1).reshape(8, 8), compute_uv=False)
    assert values[1] > 1e-3
    assert values[2] < 1e-6 * values[0]


@evidence(
    "G09", oracle="s = alpha / sqrt(r): the variance of s x A B is that of every rank", code="llmjax.adapters.lora"
)
def test_stabilised_scale(evidence):
    """With unit B, the output's deviation does not depend on the rank where stabilised, and falls as 1/sqrt(r) else."""
    random, found = np.random.default_rng(0), {}
    for stabilised in (True, False):
        for rank in (4, 256):
            a, b = random.normal(size=(512, rank)), random.normal(size=(rank, 64)) / np.sqrt(512)
            found[stabilised, rank] = float(np.std(LoRA(rank=rank, stabilised=stabilised).scale * a @ b))
    # 512 x 64 samples of a product of normals: 5 % is more than three deviations.
    evidence.record(abs(found[True, 256] / found[True, 4] - 1), 0.05)
    evidence.record(abs(found[False, 256] / found[False, 4] - math.sqrt(4 / 256)), 0.05)


def test_dropout_is_for_training_and_keeps_the_mean():
    """Without a key nothing is dropped; over many keys the mean output is that without (deviation / sqrt(keys))."""
    model = Adapted(base=BASE, adapters=(LoRA(rank=2, dropout=0.5, targets="blocks/0/mlp/down"),))
    params = shaken(model, adapted_params(model))

    def first_output(key=None):
        """Of the feed-forward layer of layer 0, which no other layer's dropout reaches."""
        named = {} if key is None else {"deterministic": False, "rngs": {"dropout": key}}
        return model.build().apply({"params": params}, TOKENS, mutable=["sites"], **named)[1]["sites"]["blocks"]["0"][
            "mlp_out"
        ][0]

    many = jax.jit(jax.vmap(first_output))(jax.random.split(jax.random.key(0), 2000))
    deviation = jnp.std(many, axis=0)
    assert deviation.max() > 0.01
    assert jnp.all(jnp.abs(jnp.mean(many, axis=0) - first_output()) <= 5 * deviation / math.sqrt(2000) + 1e-6)


@pytest.mark.adapters
@evidence("G01", oracle="the base's bytes before and after training", code="llmjax.adapters.adapted")
@evidence("G04", oracle="bytes of Adam's moments, two for each trained parameter", code="llmjax.adapters.adapted")
def test_training_changes_the_adapter_alone(tmp_path, evidence):
    """No bit of the base changes in training, the optimizer holds the adapter's moments only, and a run goes on."""
    start = tiny()
    model = Adapted(base=start.model, adapters=(LoRA(rank=2),), trained="norm/scale$")
    experiment = dataclasses.replace(start, model=model, optimizer=AdamW(schedule=Constant(learning_rate=3e-3)))
    layout = plan(model, experiment.optimizer, experiment.train, experiment.mesh.build())
    before, names = layout.init(0), set(flat(layout.abstract.params))
    assert all("adapters/" in path or path.endswith("norm/scale") for path in names)
    moments = [x for x in jax.tree.leaves(layout.abstract.opt_state) if x.ndim]
    evidence.record(sum(x.size for x in moments) - 2 * sum(x.size for x in jax.tree.leaves(layout.abstract.params)), 0)
    fit(experiment, tmp_path / "whole")
    whole = checkpoint.newest(tmp_path / "whole", print).state(layout.abstract)
    evidence.record(differing(whole.frozen, before.frozen), 0)
    assert all(
        not np.array_equal(x, y) for x, y in zip(*map(jax.tree.leaves, (whole.params, before.params)), strict=True)
    )
    shutil.rmtree(checkpoint.place(tmp_path / "whole", experiment.train.steps))
    fit(experiment, tmp_path / "whole")
    evidence.record(differing(checkpoint.newest(tmp_path / "whole", print).state(layout.abstract), whole), 0)


def test_frozen_parameters_are_kept_in_bfloat16():
    """Half the bytes for what does not train; what trains stays float32."""
    model = Adapted(base=BASE, adapters=(LoRA(rank=2),), frozen_dtype="bfloat16")
    for path, leaf in flat(model.abstract()).items():
        assert leaf.dtype == (jnp.float32 if "adapters/" in path else jnp.bfloat16)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"adapters": (LoRA(targets="nothing"),)}, "adapters.0.targets.*matches no projection.*blocks/0/mixer/query"),
        ({"adapters": (LoRA(targets="("),)}, "targets.*no regular expression"),
        ({"adapters": (LoRA(rank=9),)}, "rank=9.*exceeds the 4 of"),
        ({"adapters": (LoRA(rank=1), LoRA(rank=1))}, "adapters.1.name.*another adapter"),
        ({"adapters": (LoRA(rank=1),), "active": ("other",)}, "active.*'other'.*default"),
        ({"trained": "nothing"}, "trained.*matches no parameter"),
    ],
)
def test_what_does_not_fit_is_one_line(changes, words):
    """Bad values name the field, what is wrong, and what there is."""
    with pytest.raises(ConfigError, match=words) as caught:
        validate(Adapted(base=BASE, **changes))
    assert "\n" not in str(caught.value)
