"""A bad number put in at a known place is found at that place."""

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.nn.decoder import Decoder
from llmjax.nn.metric import Metric
from llmjax.objectives.next_token import NextToken
from llmjax.train.diagnostics import diagnose, forward_pass
from llmjax.train.errors import RunError
from llmjax.train.log import read_metrics
from llmjax.train.loop import fit
from tests.evidence import evidence
from tests.train.test_step import batch_of, build
from tests.train.tiny import tiny


def diagnosis(experiment, change=lambda params: params, batch=None):
    """What is said of an experiment whose parameters have been changed."""
    step, planned, _ = build(experiment)
    state = planned.init(0)
    state = state._replace(params=change(jax.tree.map(np.array, state.params)))
    return diagnose(step, experiment.model, state, batch_of(experiment) if batch is None else batch, 0, 0)


def put(path, index, value):
    """Put one value into the parameter at `path`."""

    def change(params):
        *folders, name = path.split("/")
        node = params
        for folder in folders:
            node = node[folder]
        node[name][index] = value
        return params

    return change


@evidence("E60", oracle="a NaN or overflow put in at a known path", code="llmjax.train.diagnostics.diagnose")
@pytest.mark.parametrize(
    ("path", "index", "value", "expected"),
    [
        ("blocks/0/mlp/up/kernel", (1, 3, 4), np.nan, "NaN in parameter blocks/0/mlp/up/kernel in layer 1 (1 of"),
        ("embed/embedding", (0, 0), np.inf, "infinity in parameter embed/embedding (1 of"),
        # A finite weight, whose product with the input overflows: the first activation after it is the culprit.
        ("blocks/0/mixer/value/kernel", 1, 3e38, "in activation blocks/0/mixer/v in layer 1 ("),
        ("blocks/0/mixer/query/kernel", 1, 3e38, "in activation blocks/0/mixer/q in layer 1 ("),
    ],
)
def test_the_first_bad_value_is_named(evidence, path, index, value, expected):
    experiment = tiny({"model.layers": 2})
    found = diagnosis(experiment, put(path, index, value))
    evidence.record(expected not in found, 0)


def test_a_bad_batch_is_named():
    experiment = tiny({"model.layers": 2})
    batch = batch_of(experiment)
    batch["loss_mask"][2, 3] = np.inf
    assert diagnosis(experiment, batch=batch).startswith("infinity in input loss_mask (1 of")


@dataclass(frozen=True)
class Steep(NextToken):
    """A finite loss whose gradient is not: sqrt at zero."""

    def loss(self, apply, params, batch, key):
        value, metrics = super().loss(apply, params, batch, key)
        return value + jnp.sqrt(jnp.sum(params["head"]["kernel"] * 0)), metrics


@pytest.mark.slow
def test_a_bad_gradient_of_a_finite_loss_is_named():
    experiment = dataclasses.replace(tiny(), objective=Steep(chunk=None))
    assert diagnosis(experiment).startswith("NaN in gradient of parameter head/kernel")


def test_nothing_wrong_is_said_so():
    assert diagnosis(tiny(accumulate=2)) == "no bad value was found when the step was run again"


@pytest.mark.slow
def test_sites_come_in_forward_order():
    model = Decoder(vocab=64, d_model=16, layers=4, pattern=(*Decoder().pattern, *Decoder().pattern))
    experiment = dataclasses.replace(tiny(), model=model)
    step, planned, _ = build(experiment)
    _, sites = forward_pass(step, model.build())(planned.init(0).params, batch_of(experiment), None)
    first, *middle, last = sites
    assert (first[0], last[0]) == ("embedded", "final")
    block = ("resid_pre", "mixer/q", "mixer/k", "mixer/v", "mixer/z", "mixer_out", "resid_mid")
    names = [name for name, *_ in middle]
    per_block = len(names) // 4
    for layer in range(4):
        part = names[layer * per_block : (layer + 1) * per_block]
        assert [f"blocks/{layer % 2}/{name}" for name in block] == part[: len(block)]
        assert part[-1] == f"blocks/{layer % 2}/resid_post"
        assert {repeat for _, repeat, _ in middle[layer * per_block : (layer + 1) * per_block]} == {layer // 2}
    # The residual stream enters a block as it left the one before.
    stream = [value for name, _, value in middle if name.endswith(("resid_pre", "resid_post"))]
    for left, entered in zip(stream[1::2], stream[2::2], strict=False):
        np.testing.assert_array_equal(left, entered)


@dataclass(frozen=True)
class Breaks(NextToken):
    """Divides by zero wherever the target 'h' (104) stands in the batch."""

    def loss(self, apply, params, batch, key):
        value, metrics = super().loss(apply, params, batch, key)
        broken = value / jnp.where(jnp.any(batch["targets"] == 104), 0.0, 1.0)
        return broken, metrics | {"loss": Metric(broken, metrics["loss"].count)}


def test_a_run_stops_after_bad_steps_in_a_row_and_keeps_its_checkpoint(tmp_path):
    experiment = dataclasses.replace(tiny(stop_after_bad=3, log_every=1, eval_every=0), objective=Breaks(chunk=None))
    with pytest.raises(RunError, match="3 steps in a row, up to step 3: the loss is inf, though every activation is"):
        fit(experiment, tmp_path)
    assert [line["skipped"] for line in read_metrics(tmp_path)] == [1, 2]
