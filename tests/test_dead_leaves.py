"""Every leaf of an experiment is alive: another value changes the schedule, weights, batches, step, text or the run.

(A peer ships `rope_theta` presets that its models never read.) What is observed is ordered from cheap to dear and the
first difference ends the search. The few leaves that need not change any of it stand in EXEMPT, each with its reason.
"""

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import jax
import numpy as np
import pytest

from llmjax.config import ConfigError, leaves, subclasses, validate, with_
from llmjax.data import Bytes, ConcatAndSplit, Data, FirstFit, InMemory, Packing, Padded
from llmjax.decode.config import Generate
from llmjax.decode.generate import generate
from llmjax.experiment import Experiment
from llmjax.fields import hints, known
from llmjax.nn.attention import Attention
from llmjax.nn.block import Block
from llmjax.nn.decoder import Decoder
from llmjax.nn.initializers import FanInInit, LlamaInit
from llmjax.nn.masks import Window
from llmjax.nn.mlp import GLU, MLP
from llmjax.nn.model import draw
from llmjax.nn.norms import LayerNorm, RMSNorm
from llmjax.nn.positions import LearnedPositions, SinusoidalPositions
from llmjax.train.config import Train
from llmjax.train.early_stopping import EarlyStopping
from llmjax.train.ema import Ema
from llmjax.train.loop import fit
from llmjax.train.loss_scale import Dynamic
from llmjax.train.optimizers import AdamW, Group, Optimizer
from llmjax.train.precision import Precision
from llmjax.train.ramp import BatchRamp
from llmjax.train.schedules import Cosine, Schedule
from llmjax.train.state import plan
from llmjax.train.step import Step, apply_of

pytestmark = pytest.mark.devices(8)

EXEMPT = {
    "name": "names the run directory and the report",
    "data.cache_dir": "says where files are kept, not what is in them",
    "data.on_error": "matters only where a record is bad (tests/data)",
    "optimizer.groups.0.frozen": "contradicts the other fields of that group; group 1's is alive",
    "model.distance": "has no place beside mixers that rotate (tests/mixers/test_leaves.py)",
    "model.pattern.0.cross": "has no place in a decoder (tests/mixers/test_leaves.py)",
    "model.pattern.1.cross": "has no place in a decoder (tests/mixers/test_leaves.py)",
    "model.pattern.0.mixer.causal": "has one value in a decoder (tests/mixers/test_leaves.py)",
    "model.pattern.1.mixer.causal": "has one value in a decoder (tests/mixers/test_leaves.py)",
    "model.pattern.1.mixer.qk_norm_over": "matters only where there is a qk_norm; that of block 0 is alive",
    "model.pattern.0.mixer.rope.sections": "matters only where positions have several axes (tests/nn/test_rope.py)",
    "mesh.slices": "orders devices by the network between them (tests/parallel/test_mesh.py)",
    "mesh.microbatches": "matters only where there are stages (tests/parallel/test_pipeline.py)",
    "mesh.rounds": "matters only where there are stages (tests/parallel/test_pipeline.py)",
    "mesh.rules": "is empty here (tests/parallel/test_mesh.py)",
    "mesh.expert": "is an error where there are no experts (tests/parallel/test_mesh.py)",
    "generate.prompt": "is what the command line continues by default (tests/test_cli.py)",
    "generate.stop": "is looked for by the text layer (tests/decode)",
    "generate.stop_at_eos": "is looked for by the text layer (tests/decode)",
}

# In the names of what the clock says, which differs from run to run.
CLOCK = ("seconds", "per_second", "wait")

QUICK = ("seed", "data.")
DEAR = ("model.pattern.0.", "model.pattern.1.", "model.", "objective.", "optimizer.", "train.", "mesh.", "generate.")

TEXTS = tuple("".join(chr(97 + (i * j + i // 3) % 26) for j in range(4 + 9 * (i % 3))) for i in range(60))


GROUPS = (Group(path="embed", learning_rate=0.5, weight_decay=0.2), Group(path="head"))


def rich() -> Decoder:
    """A stack with every optional part switched on so that its leaves exist."""
    first = Block(
        mixer=Attention(heads=4, kv_heads=2, head_dim=4, mask=Window(5), qk_norm=RMSNorm(), soft_cap=5.0),
        mlp=GLU(d_ff=24),
        dropout=0.1,
    )
    second = Block(mixer=Attention(heads=2, rope=None), mlp=MLP(d_ff=24, bias=True), norm=LayerNorm(), order="post")
    return Decoder(
        vocab=257,
        d_model=16,
        layers=4,
        pattern=(first, second),
        positions=LearnedPositions(64),
        soft_cap=9.0,
        unroll=1,
    )


def plain() -> Decoder:
    """A stack that is lowered in a third of the time, for the leaves of everything else."""
    block = Block(mixer=Attention(heads=2), mlp=MLP(d_ff=16), dropout=0.1)
    return Decoder(vocab=257, d_model=8, layers=2, pattern=(block,), positions=LearnedPositions(64), unroll=1)


def base(model: Decoder) -> Experiment:
    """An experiment with every optional part switched on."""
    return Experiment(
        model=model,
        data=Data(source=InMemory(texts=TEXTS, holdout=0.2), tokenizer=Bytes(), length=16, batch_size=8),
        optimizer=AdamW(schedule=Cosine(warmup=2), groups=GROUPS),
        train=Train(
            steps=4,
            accumulate=2,
            ramp=BatchRamp(start=1, over=24),
            eval_every=2,
            checkpoint_every=1,
            log_every=1,
            precision=Precision(compute="float16", loss_scale=Dynamic()),
            ema=Ema(),
            early_stopping=EarlyStopping(patience=2),
        ),
        generate=Generate(max_tokens=12, temperature=0.9, top_k=20, top_p=0.9, min_p=0.01, cache_length=32),
    )


def digest(tree: Any) -> str:
    """Hash of all arrays of a tree, shapes and dtypes included."""
    hasher = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        array = np.asarray(leaf)
        hasher.update(f"{array.shape}{array.dtype}".encode() + array.tobytes())
    return hasher.hexdigest()


class Observer:
    """Answers "what would this experiment do?" by ever dearer looks, each made once."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.known = folder, {}
        self.runs = itertools.count()
        self.cheap = (self.schedule, self.stopping, self.batches, self.text)
        self.dear = (self.weights, self.step, self.run)
        self.read = {"schedule": ("optimizer",), "weights": ("model", "seed"), "batches": ("data", "seed")}
        self.read |= {"stopping": ("train",), "text": ("generate",)}

    def same(self, one: Experiment, others: list[Experiment]) -> bool:
        """Whether no look tells `one` from the others; all of them are looked at cheaply before one is lowered."""
        pairs = itertools.chain(itertools.product(self.cheap, others), ((d, o) for o in others for d in self.dear))
        return all(self.look(look, one) == self.look(look, other) for look, other in pairs)

    def look(self, look: Callable[[Experiment], Any], experiment: Experiment) -> Any:
        """The result of one look, remembered for the nodes that it reads; an error counts as a result."""
        nodes = self.read.get(look.__name__, [field.name for field in dataclasses.fields(experiment)])
        key = (look.__name__, *(getattr(experiment, node) for node in nodes))
        if key not in self.known:
            try:
                self.known[key] = look(experiment)
            except (ValueError, NotImplementedError, FloatingPointError) as error:
                self.known[key] = f"{type(error).__name__}: {error}"
        return self.known[key]

    def schedule(self, e: Experiment) -> list[float]:
        return [e.optimizer.schedule.value(step, 20) for step in range(25)]

    def stopping(self, e: Experiment) -> list[bool]:
        """Where a loss that falls, wavers and rises would end the run."""
        rule = e.train.early_stopping or EarlyStopping(patience=99)
        losses = (3.0, 2.0, 1.9, 2.5, 1.85, 1.84, 1.7, 1.8, 1.75, 1.9, 1.95, 2.0, 2.1, 2.4, 2.6)
        states = itertools.accumulate(enumerate(losses), lambda s, x: rule.update(s, *x), initial=rule.init())
        return [rule.should_stop(state) for state in states]

    def weights(self, e: Experiment) -> str:
        """The program that draws the weights (lowered, not compiled), and its seed."""
        return draw.lower(e.model, jax.random.key(0)).as_text() + str(e.seed)

    def batches(self, e: Experiment) -> str:
        pipeline = e.data.build(e.seed, self.folder / "cache")
        return digest([pipeline.batch(0), pipeline.batch(1), pipeline.batch(5), list(pipeline.eval_batches())])

    def step(self, e: Experiment) -> str:
        """The lowered training step, and one update of the optimizer's state."""
        mesh = e.mesh.build()
        state = plan(e.model, e.optimizer, e.train, mesh)
        step = Step(apply_of(e.model.build()), e.objective, state.optimizer, e.train, e.optimizer.needs_objective)
        batch = e.data.build(e.seed, self.folder / "cache").batch(0)
        scalars = (jax.ShapeDtypeStruct((), dtype) for dtype in (np.float32, np.int32, np.uint32))
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch)
        return jax.jit(step).lower(state.abstract, shapes, *scalars).as_text()

    def text(self, e: Experiment) -> str:
        """What a small model says: how it is sampled is the `generate` node's business alone."""
        model = Decoder(vocab=257, d_model=8, layers=1, pattern=(Block(mixer=Attention(heads=1), mlp=None),))
        params = jax.tree.map(lambda a: a * 8, model.init(jax.random.key(0)))
        return digest(generate(e.generate, model, params, ([104, 105], [97] * 12 + [98, 99]), stop_ids=range(97, 110)))

    def run(self, e: Experiment) -> tuple[Any, ...]:
        folder = self.folder / f"run{next(self.runs)}"
        result = fit(dataclasses.replace(e, data=dataclasses.replace(e.data, cache_dir=str(self.folder))), folder)
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        kept = [{k: v for k, v in line.items() if not any(word in k for word in CLOCK)} for line in lines]
        files = sorted({str(p.relative_to(folder).parent) for p in folder.rglob("*") if p.is_file()})
        return json.dumps(kept), tuple(files), result["stopped"]


def has_default(field: dataclasses.Field[Any]) -> bool:
    """Whether a config can be made without naming that field."""
    return field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING


def candidates(value: Any, hint: Any) -> Iterator[Any]:
    """Other values of a leaf, likely valid ones first."""
    literals = [a for h in (hint, *get_args(hint)) if get_origin(h) is Literal for a in get_args(h)]
    classes = known(hint)
    if value is None and classes:
        yield from (cls() for cls in classes.values() if all(has_default(f) for f in dataclasses.fields(cls)))
    elif literals:
        yield from (other for other in literals if other != value)
    elif isinstance(value, bool):
        yield not value
    elif isinstance(value, int):
        yield from (value + 1, 1, value * 2, value // 2, value - 1, value + 2, 4 * value, 8 * value)
    elif isinstance(value, float):
        yield from (value * 0.5, value + 0.1, value * 2, value + 1.0, 1e-2, 0.9)
    elif isinstance(value, str):
        yield from (value + "x", "kernel", "")
    elif isinstance(value, tuple):
        yield value[:-1]
    else:
        yield from (1, 3, 7, 0.3, "reference", "fast", 0.9)


def hint_of(config: Any, path: str) -> Any:
    """The annotation of the leaf at `path`."""
    *parents, name = path.split(".")
    for part in parents:
        config = config[int(part)] if isinstance(config, tuple) else getattr(config, part)
    return Any if isinstance(config, tuple) else hints(type(config))[name]


def changed(experiment: Experiment, path: str) -> Iterator[Experiment]:
    """Valid experiments that differ from `experiment` in that leaf."""
    for value in candidates(leaves(experiment)[path], hint_of(experiment, path)):
        try:
            other = with_(experiment, path, value)
            validate(other)
        except ConfigError:
            continue
        yield other


def dead(observer: Observer, experiment: Experiment, under: str = "") -> list[str]:
    """Leaves below `under`, but not of a room further down, whose other values leave all observations as they are."""
    deeper = tuple(room for room in (*QUICK, *DEAR) if room.startswith(under) and room != under)
    paths = [p for p in leaves(experiment) if p.startswith(under) and not p.startswith(deeper) and p not in EXEMPT]
    assert paths
    return [p for p in paths if observer.same(experiment, list(changed(experiment, p)))]


@pytest.fixture
def observer(tmp_path_factory):
    return Observer(tmp_path_factory.mktemp("observed"))


def test_every_leaf_of_the_base_is_in_a_room():
    rooms = (*QUICK, *DEAR, *EXEMPT)
    assert [p for p in leaves(base(rich())) if not p.startswith(rooms)] == []
    assert set(EXEMPT) <= set(leaves(base(rich())))


@pytest.mark.parametrize("room", [*QUICK, *(pytest.param(room, marks=pytest.mark.matrix) for room in DEAR)])
def test_every_leaf_of_the_base_is_alive(observer, room):
    assert dead(observer, base(rich() if room.startswith("model.") else plain()), room) == []


def swaps() -> dict[str, tuple[str, Any]]:
    """Components that the base does not use: where they go, and the component with its optional parts on."""
    rest = {
        f"optimizer {name}": ("optimizer", cls(groups=GROUPS))
        for name, cls in subclasses(Optimizer).items()
        if name not in ("AdamW", "GatedAdamW", "RankBudgetAdamW")  # the base's, and those that want adapters to prune
    }
    rest |= {
        f"schedule {name}": ("optimizer.schedule", cls(warmup=2))
        for name, cls in subclasses(Schedule).items()
        if cls is not Cosine
    }
    rest["packing Padded"] = ("data.packing", Padded())  # FirstFit has no leaves
    for part in (FanInInit(), LlamaInit()):
        rest[f"initializer {type(part).__name__}"] = ("model.initializer", part)
    return rest | {"positions Sinusoidal": ("model.positions", SinusoidalPositions())}


@pytest.mark.matrix
@pytest.mark.parametrize("name", list(swaps()))
def test_every_leaf_of_the_other_components_is_alive(observer, name):
    path, part = swaps()[name]
    experiment = with_(base(plain()), path, part)
    assert dead(observer, experiment, f"{path}.") == []


@pytest.mark.matrix
def test_a_run_repeated_looks_the_same(observer):
    """What differs by itself would make every leaf look alive."""
    observer.cheap, observer.dear = (), (observer.run,)
    first, again = base(plain()), with_(base(plain()), "generate.seed", 1)
    assert observer.same(first, [again])


def test_every_packing_and_initializer_is_swept():
    assert set(subclasses(Packing)) == {ConcatAndSplit.__name__, FirstFit.__name__, Padded.__name__}


@pytest.mark.matrix
def test_a_dead_leaf_is_found(observer):
    """The test can fail: a config with a leaf that nobody reads is caught."""

    @dataclasses.dataclass(frozen=True)
    class Forgetful(GLU):
        """A GLU that forgot its option."""

        unread: float = 1.0
        """read by nobody"""

    experiment = with_(base(plain()), "model.pattern.0.mlp", Forgetful(d_ff=24))
    observer.dear = observer.dear[:2]
    assert dead(observer, experiment, "model.pattern.0.mlp") == ["model.pattern.0.mlp.unread"]
