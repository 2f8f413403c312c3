"""Pairwise combinations of the parts of a model and of a run: two steps each, finite, equal to one device.

Every mixer, position encoding, feed-forward layer, packing, wiring, remat and mesh is found by type. A row of the
covering array holds a group of mixers, one after the other in the pattern, so that few rows meet all pairs; of adapters
there is one of each kind. That every adapter has a layout on every mixer is a test of its own, which compiles nothing.
"""

import dataclasses
import itertools
import re

import jax
import numpy as np
import pytest

from llmjax.config import ConfigError, validate
from llmjax.data import Bytes, Data, InMemory, Packing, Padded
from llmjax.experiment import Experiment
from llmjax.fields import hints, subclasses
from llmjax.nn.block import Block
from llmjax.nn.decoder import Decoder
from llmjax.nn.distance import DistanceBias
from llmjax.nn.masks import Full
from llmjax.nn.mlp import GLU, FeedForward
from llmjax.nn.model import flat
from llmjax.nn.positions import LearnedPositions, Positions
from llmjax.nn.rope import Rope
from llmjax.nn.rope_scaling import RopeScaling, YaRN
from llmjax.parallel.mesh import MeshConfig, batch_sharding
from llmjax.train.config import Train
from llmjax.train.optimizers import AdamW
from llmjax.train.prefetch import put
from llmjax.train.schedules import Cosine
from llmjax.train.state import plan
from llmjax.train.step import Compiled, Step, apply_of
from tests.adapters.cases import METHODS
from tests.mixers.cases import CASES, CAUSAL, INIT
from tests.pairs.changed import EVERY, QUANT, changed, packs

pytestmark = pytest.mark.devices(8)

TEXTS = tuple("".join(chr(97 + (i * j + i // 3) % 26) for j in range(4 + 9 * (i % 3))) for i in range(60))
GROUP = 6
MIXERS = [name for name in CAUSAL if type(CASES[name]).__name__ == name or name.startswith("mask-")]
GROUPS = [tuple(MIXERS[i : i + GROUP]) for i in range(0, len(MIXERS), GROUP)]


def places():
    """Position encodings: absolute ones, rotary ones and biases, each as (fields of the model, rope of the mixers)."""
    absolute = {name: ({"positions": cls()}, None) for name, cls in subclasses(Positions).items()}
    absolute["LearnedPositions"] = ({"positions": LearnedPositions(32)}, None)
    biases = {name: ({"distance": cls()}, None) for name, cls in subclasses(DistanceBias).items()}
    scaled = {name: ({}, Rope(scaling=cls(**small))) for name, (cls, small) in scalings().items()}
    return {"none": ({}, None), "Rope": ({}, Rope()), **absolute, **biases, **scaled}


def scalings():
    """Rotary scalings with values that matter on 16 tokens; YaRN stands for those that only change frequencies."""
    return {name: (cls, {"original_length": 8}) for name, cls in subclasses(RopeScaling).items() if cls is YaRN}


FACTORS = {
    "mixers": GROUPS,
    "place": list(places()),
    "mlp": ["none", *subclasses(FeedForward)],
    "order": ["pre", "post", "parallel", "parallel_norms", "branch", "sandwich"],
    "packing": list(subclasses(Packing)),
    "remat": ["none", "dots", "attention", "full"],
    "adapters": [(), ("LoRA",), ("DoRA",), ("VeRA",), ("IA3",), ("Bottleneck",), ("PrefixTuning",)],
    "quant": list(QUANT),
    "mesh": [MeshConfig(data=2, fsdp=2, tensor=2), MeshConfig(fsdp=4, tensor=2), MeshConfig(data=8)],
}


def covering():
    """Rows that hold every pair of values of two factors: greedy, deterministic."""
    names = list(FACTORS)
    wanted = {
        ((one, i), (two, j))
        for one, two in itertools.combinations(names, 2)
        for i in range(len(FACTORS[one]))
        for j in range(len(FACTORS[two]))
    }
    rows = []
    while wanted:
        row = dict(min(wanted))
        for name in names:
            if name not in row:
                chosen = list(row.items())
                gain = [sum(pair(c, (name, i), names) in wanted for c in chosen) for i in range(len(FACTORS[name]))]
                row[name] = int(np.argmax(gain))
        rows.append({name: row[name] for name in names})
        wanted -= {pair(a, b, names) for a, b in itertools.combinations(row.items(), 2)}
    return rows


def pair(one, two, names):
    """Two choices in the order of the factors."""
    return tuple(sorted((one, two), key=lambda choice: names.index(choice[0])))


def feed_forward(name):
    """A small feed-forward layer of that class."""
    cls = subclasses(FeedForward).get(name)
    if cls is None:
        return None
    return cls(d_ff=24) if "d_ff" in {f.name for f in dataclasses.fields(cls)} else cls(expert=GLU(d_ff=8))


def placed(mixer, rope):
    """The mixer with these rotary positions, where it takes some or none, and its own otherwise."""
    hint = hints(type(mixer)).get("rope")
    if hint is None or (rope is None and hint is Rope):
        return mixer
    return dataclasses.replace(mixer, rope=rope, **({"soft_cap": None} if hasattr(mixer, "soft_cap") else {}))


def takes(mixer, fields):
    """Whether a mixer and a bias by distance make a pair; one that does not is a config error that says why."""
    known = getattr(mixer, "mask", Full()).takes_distance() and not getattr(mixer, "rope", None)
    if "distance" not in fields or known:
        return True
    pattern = (Block(mixer=dataclasses.replace(CASES["Attention"], rope=None)), Block(mixer=mixer))
    with pytest.raises(ConfigError, match=r"one table of distance biases|which have no one place"):
        validate(Decoder(vocab=257, d_model=16, layers=2, pattern=pattern, **fields))
    return False


def fitting(base, names, quant, packing):
    """The adapters that go with the base and the packing; what does not is a config error that says why.

    Those before the first token want rows of one document, a prefix behind gates attention alone, and those that move
    a part of a matrix one that is no code.
    """
    return tuple(name for name in names if fits(changed(base, (name,), quant, False), packing))


def fits(model, packing):
    """Whether a model with one adapter and a packing make a pair."""
    if not getattr(model, "slots", 0) and not getattr(model.adapters[0], "moves", False):
        return True
    try:
        validate(Experiment(model=model, data=Data(tokenizer=Bytes(), packing=packing, length=16, batch_size=8)))
        model.boxed()
    except ConfigError as error:
        if re.search(
            r"use Padded\(\)|hidden from a recurrence|which is quantised|state of keys, values and", str(error)
        ):
            return False
        raise
    return True


def experiment(row):
    """The experiment of a row of the covering array."""
    chosen = {name: FACTORS[name][i] for name, i in row.items()}
    fields, rope = places()[chosen["place"]]
    mixers = [placed(CASES[name], rope) for name in chosen["mixers"]]
    mixers = [mixer for mixer in mixers if takes(mixer, fields)]
    heads = next((n for mixer in mixers if (n := mixer.distance_heads())), None)
    if "distance" in fields:
        mixers = [mixer for mixer in mixers if mixer.distance_heads() in (None, heads)]
    blocks = [Block(mixer=mixer, mlp=feed_forward(chosen["mlp"]), order=chosen["order"]) for mixer in mixers]
    if not any(mixer.distance_heads() for mixer in mixers):
        fields = {name: value for name, value in fields.items() if name != "distance"}
    model = dict(vocab=257, d_model=16, layers=2 * len(blocks), pattern=tuple(blocks), remat=chosen["remat"], unroll=1)
    source, packing = InMemory(texts=TEXTS, holdout=0.2), subclasses(Packing)[chosen["packing"]]()
    base = Decoder(**model, **fields, initializer=INIT)
    fitting_ones = fitting(base, chosen["adapters"], chosen["quant"], packing)
    return Experiment(
        model=changed(base, fitting_ones, chosen["quant"], True),
        data=Data(source=source, tokenizer=Bytes(), packing=packing, length=16, batch_size=8),
        optimizer=AdamW(schedule=Cosine(warmup=2)),
        train=Train(steps=2),
        mesh=chosen["mesh"],
    )


def layouts():
    """Every group of adapters on every group of mixers; a third of the pairs is in the suite that CI runs."""
    adapters = [names for names in packs().values() if names]
    for (i, pack), (j, group) in itertools.product(enumerate(adapters), enumerate(GROUPS)):
        mark = pytest.mark.long if (i + j) % 3 else pytest.mark.matrix
        yield pytest.param(pack, group, marks=mark, id=f"{'+'.join(pack)}-{group[0]}")


@pytest.mark.parametrize(("pack", "group"), list(layouts()))
def test_every_adapter_has_a_layout_on_every_mixer(pack, group):
    """Each on all matrices of each mixer, four-bit codes below them; and it trains there."""
    mixers = [CASES[name] for name in group]
    base = Decoder(vocab=257, d_model=16, layers=len(mixers), pattern=tuple(Block(mixer=m) for m in mixers), unroll=1)
    names = fitting(base, pack, "nf4", Padded())
    model = changed(base, names, "nf4", False)
    trained = flat(plan(model, AdamW(), Train(), FACTORS["mesh"][0].build()).abstract.params)
    for name in names:
        method = model.adapters[names.index(name)]
        there = {path.partition("adapters/")[0] for path in trained if f"adapters/{name}/" in path}
        assert there
        if name in METHODS and there != {""}:
            assert there - {""} == {f"{path}/" for path in method.found(model.base)}


def losses(e, mesh, folder):
    """Losses of two steps, and the parameters after them."""
    mesh = mesh.build()
    planned = plan(e.model, e.optimizer, e.train, mesh)
    step = Step(apply_of(e.model.build()), e.objective, planned.optimizer, e.train)
    batches = e.data.build(e.seed, folder)
    compiled = Compiled(step, planned, mesh).compile(batches.batch(0))
    state, found = planned.init(0), []
    for i in range(2):
        state, metrics = compiled(state, put(batches.batch(i), batch_sharding(mesh)), 1e-2, i, 0)
        found.append(float(metrics["loss"].total / metrics["loss"].count))
    return found, jax.device_get(state.params)


@pytest.mark.long
@pytest.mark.parametrize("row", covering(), ids=lambda row: "-".join(map(str, row.values())))
def test_pairs_train_as_on_one_device(row, tmp_path):
    """Sums over devices are in another order; two steps of Adam turn rounding of tiny gradients into its step size."""
    e = experiment(row)
    validate(e)
    many, _ = losses(e, e.mesh, tmp_path)
    one, _ = losses(e, MeshConfig(), tmp_path)
    assert np.isfinite(one).all()
    np.testing.assert_allclose(many, one, rtol=2e-4)


def test_every_pair_is_met():
    rows = covering()
    for one, two in itertools.combinations(FACTORS, 2):
        met = {(row[one], row[two]) for row in rows}
        assert len(met) == len(FACTORS[one]) * len(FACTORS[two])
    assert {name for group in GROUPS for name in group} == set(MIXERS)
    assert {name for pack in packs().values() for name in pack} == set(EVERY)
