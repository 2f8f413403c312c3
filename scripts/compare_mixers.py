"""Every sequence mixer on tasks that tell mixers apart: writes docs/mixers.json, docs/mixers.md and docs/mixers.png.

    python -m scripts.compare_mixers                          everything
    python -m scripts.compare_mixers --only Mamba positions   these runs or sections; what else the page has stays
    python -m scripts.compare_mixers --only speed             layers timed again, on an idle machine
    python -m scripts.compare_mixers --only none              the page again, from docs/mixers.json

Mixers and masks are found by type; their sizes, hybrids and what else is tried stand below. Models are trained side by
side, one core each; then layers are timed one after the other, with the whole machine.
"""

import argparse
import datetime
import importlib.metadata
import json
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from llmjax.data import Bytes, Data, Dataset, PythonDocs
from llmjax.data.synthetic import Synthetic
from llmjax.data.tasks.base import Task
from llmjax.data.tasks.copying import Copying
from llmjax.data.tasks.induction import Induction
from llmjax.data.tasks.needle import Needle
from llmjax.data.tasks.permutations import Permutations
from llmjax.data.tasks.recall import Recall
from llmjax.data.tasks.selective_copying import SelectiveCopying
from llmjax.fields import subclasses
from llmjax.nn.alibi import ALiBi
from llmjax.nn.attention import Attention
from llmjax.nn.block import Block
from llmjax.nn.decoder import Decoder
from llmjax.nn.delta_net import DeltaNet, GatedDeltaNet
from llmjax.nn.hyena import Hyena
from llmjax.nn.hymba import Hymba
from llmjax.nn.initializers import GPT2Init
from llmjax.nn.lsh_attention import LSHAttention
from llmjax.nn.mamba import Mamba
from llmjax.nn.mamba2 import Mamba2
from llmjax.nn.mask_bigbird import BigBird
from llmjax.nn.mask_longformer import Longformer
from llmjax.nn.mask_longnet import LongNet
from llmjax.nn.mask_moba import MoBA
from llmjax.nn.mask_multiscale import MultiScale
from llmjax.nn.mask_sparse import SparseTransformer
from llmjax.nn.masks import AttentionMask, Chunked, Window
from llmjax.nn.memorizing import MemorizingAttention
from llmjax.nn.mixer import Context, Mixer
from llmjax.nn.mla import MLA
from llmjax.nn.positions import LearnedPositions, SinusoidalPositions
from llmjax.nn.t5_bias import T5Bias
from llmjax.objectives.next_token import NextToken
from llmjax.parallel.mesh import MeshConfig
from llmjax.train.config import Train
from llmjax.train.evaluate import Evaluator
from llmjax.train.optimizers import AdamW
from llmjax.train.schedules import Cosine
from llmjax.train.state import plan
from llmjax.train.step import Compiled, Step, apply_of
from scripts.mixers_page import figure, page
from scripts.timing import interleaved

DOCS = Path(__file__).resolve().parent.parent / "docs"
WIDTH, LAYERS, VOCAB, LENGTH, BATCH, STEPS, RATE = 64, 2, 257, 64, 32, 300, 5e-3
DONE = 0.995
"""Share of right answers at which training ends early."""
MOST_BYTES = 6 * 2**30
"""Temporary memory above which a layer is not timed."""
PACKAGES = ("jax", "flax", "optax", "numpy")

TASKS: dict[str, Task] = {
    "recall": Recall(pairs=16, keys=16),
    "copying": Copying(letters=16),
    "selective copying": SelectiveCopying(count=8, letters=16),
    "induction": Induction(letters=7),
    "permutations": Permutations(degree=3, swaps=True),
    "needle": Needle(needles=1, keys=16, hay=16),
}
SMALL: dict[type, Any] = {
    MLA: MLA(heads=4, kv_rank=16, q_rank=None, nope_dim=8, rope_dim=8, value_dim=16),
    LSHAttention: LSHAttention(buckets=8, reach=8),
    MemorizingAttention: MemorizingAttention(segment=16, memory=4096, retrieved=8),
    Hyena: Hyena(filter_length=64, d_filter=16),
    Mamba: Mamba(d_state=8, expand=1),
    Mamba2: Mamba2(d_state=16, head_dim=16, expand=1),
    Hymba: Hymba(mask=Window(16), ssm=Mamba(d_state=8, expand=1)),
    Window: Window(16),
    Chunked: Chunked(16),
    BigBird: BigBird(block=8, globals=1, window=1, random=1),
    Longformer: Longformer(window=16, globals=2),
    LongNet: LongNet(segments=(16, 32, 64), dilations=(1, 2, 4)),
    MoBA: MoBA(size=8, top_k=2),
    MultiScale: MultiScale(block=8),
    SparseTransformer: SparseTransformer(stride=8),
}
"""Mixers and masks whose defaults are not made for width 64 and 64 tokens."""

HYBRIDS: dict[str, tuple[Mixer, ...]] = {
    "Mamba, then Attention": (SMALL[Mamba], Attention()),
    "Mamba2, then Attention": (SMALL[Mamba2], Attention()),
    "DeltaNet, then Attention": (DeltaNet(), Attention()),
    "GatedDeltaNet, then Attention": (GatedDeltaNet(), Attention()),
    "Window, then Attention": (Attention(mask=Window(16)), Attention()),
    "DeltaNet, negative": (DeltaNet(negative=True),),
}
"""Two different layers, and options that change what a layer can do."""

SIZES = {f"state {4 * n * 16 * 4} bytes": (DeltaNet(key_dim=n),) for n in (1, 2, 4, 8, 16)}
"""DeltaNet with ever larger states, on recall."""

UNROTATED = Attention(rope=None)
POSITIONS: dict[str, dict[str, Any]] = {
    "learned": {"mixer": UNROTATED, "positions": LearnedPositions(1024)},
    "sinusoidal": {"mixer": UNROTATED, "positions": SinusoidalPositions()},
    "none": {"mixer": UNROTATED},
    "rotary": {"mixer": Attention()},
    "T5 bias": {"mixer": UNROTATED, "distance": T5Bias()},
    "ALiBi": {"mixer": UNROTATED, "distance": ALiBi()},
}
"""Ways to tell attention where tokens are."""


@dataclass(frozen=True)
class Effort:
    """How much is spent on a run."""

    steps: int = STEPS
    """of training"""
    eval_batches: int | None = None
    """held out; None for all"""
    costed: tuple[int, ...] = (512, 4096)
    """lengths at which states, FLOPs and speed are given"""
    tested: tuple[int, ...] = (128, 256, 512, 1024)
    """lengths at which positions are tested; they are trained at the first"""


QUICK = Effort(steps=1, eval_batches=1, costed=(16, 32), tested=(16, 32))
"""Enough to see that it works."""


def model_of(*mixers: Mixer, **fields: Any) -> Decoder:
    """Layers of nothing but mixers: what a feed-forward layer could do instead of them is not done."""
    pattern = tuple(Block(mixer=mixer, mlp=None) for mixer in mixers)
    return Decoder(vocab=VOCAB, d_model=WIDTH, layers=LAYERS, pattern=pattern, initializer=GPT2Init(0.1), **fields)


def rows_of(task: Task) -> Synthetic:
    """The task's rows."""
    return Synthetic(length=LENGTH, batch_size=BATCH, task=task, eval_rows=128)


def mixers() -> tuple[dict[str, tuple[Mixer, ...]], dict[str, str]]:
    """What is compared, by name, and what is left out, with the reason."""
    found: dict[str, tuple[Mixer, ...]] = {}
    left_out: dict[str, str] = {}
    for name, cls in subclasses(Mixer).items():
        found[name] = (SMALL.get(cls) or cls(),)
    for name, cls in subclasses(AttentionMask).items():
        found[f"Attention, {name}"] = (Attention(mask=SMALL.get(cls) or cls()),)
    for name, layers in list(found.items()):
        if any(mixer.sees_future() for mixer in layers):
            left_out[name] = "sees later tokens, which these tasks ask for"
            del found[name]
    del found["Attention, Full"]  # which is Attention
    del found["LandmarkAttention"]
    left_out["LandmarkAttention"] = "needs a token of its own at the end of each block, which these tasks do not have"
    return found | HYBRIDS, left_out


# ---- training --------------------------------------------------------------------------------------------------------


@dataclass
class Trainer:
    """A model's compiled step, used for one kind of rows after the other."""

    model: Decoder
    effort: Effort
    data: Dataset
    metric: str = "accuracy"

    def __post_init__(self) -> None:
        """Compile for rows like those of `data`."""
        self.optimizer = AdamW(schedule=Cosine(learning_rate=RATE, warmup=0.25), weight_decay=0.0)
        train, mesh = Train(steps=self.effort.steps), MeshConfig().build()
        self.plan = plan(self.model, self.optimizer, train, mesh)
        step = Step(apply_of(self.model.build()), NextToken(), self.plan.optimizer, train)
        self.compiled = Compiled(step, self.plan, mesh).compile(self.data.build(0).batch(0))
        self.evaluator = Evaluator(step, mesh)

    def run(self, data: Dataset) -> tuple[Any, dict[str, Any]]:
        """Parameters trained on `data`, and the record: the held-out metric, its course, seconds."""
        batches, steps, curve = data.build(0), self.effort.steps, []
        state, start = self.plan.init(0), time.perf_counter()
        for step in range(steps):
            rate = self.optimizer.schedule.value(step, steps)
            state, _ = self.compiled(state, batches.batch(step), rate, step, 0)
            if (step + 1) % max(steps // 6, 1) == 0 or step + 1 == steps:
                curve.append((step + 1, self.measured(state.params, data)))
                if self.metric == "accuracy" and curve[-1][1] >= DONE:
                    break
        return state.params, {self.metric: curve[-1][1], "curve": curve, "seconds": time.perf_counter() - start}

    def measured(self, params: Any, data: Dataset) -> float:
        """The metric over the held-out rows."""
        return self.evaluator(params, data.build(0).eval_batches(self.effort.eval_batches))[self.metric]


def compared(layers: tuple[Mixer, ...], effort: Effort) -> dict[str, Any]:
    """Accuracy on all tasks, and what the model holds and computes; its speed is measured later, undisturbed."""
    model, rows = model_of(*layers), {name: rows_of(task) for name, task in TASKS.items()}
    trainer = Trainer(model, effort, rows["recall"])
    each = LAYERS // len(layers)
    return {
        "config": [repr(mixer) for mixer in layers],
        "parameters": model.num_params(),
        "state_bytes": {n: each * sum(m.state_bytes(WIDTH, n, jnp.float32) for m in layers) for n in effort.costed},
        "flops_per_token": {n: model.flops_per_token(n) for n in effort.costed},
        "tasks": {name: trainer.run(data)[1] for name, data in rows.items()},
    }


def sized(layers: tuple[Mixer, ...], effort: Effort) -> dict[str, Any]:
    """Recall, and the bytes of the recurrent states in both layers, the convolutions' left out."""
    data = rows_of(TASKS["recall"])
    total = LAYERS // len(layers) * sum(m.init_state(WIDTH, 1, LENGTH, jnp.float32)["state"].nbytes for m in layers)
    record = Trainer(model_of(*layers), effort, data).run(data)[1]
    return {"config": [repr(m) for m in layers], "state_bytes": total, **record}


def extrapolated(where: dict[str, Any], effort: Effort) -> dict[str, Any]:
    """Text in short rows, and tested in longer ones: bits per byte."""
    fields = {name: value for name, value in where.items() if name != "mixer"}
    data = Data(source=PythonDocs(), tokenizer=Bytes(), length=effort.tested[0], batch_size=16)
    trainer = Trainer(model_of(where["mixer"], **fields), effort, data, "bits_per_byte")
    params, record = trainer.run(data)
    longer = {n: replace(data, length=n, batch_size=2) for n in effort.tested}
    tested = {n: trainer.measured(params, rows) for n, rows in longer.items()}
    return {"config": [repr(value) for value in where.values()], "tested": tested, **record}


SECTIONS: dict[str, Callable[[Any, Effort], dict[str, Any]]] = {
    "mixers": compared,
    "sizes": sized,
    "positions": extrapolated,
}


# ---- speed -----------------------------------------------------------------------------------------------------------


def speeds(layers: tuple[Mixer, ...], effort: Effort, rounds: int = 3) -> dict[int, float | str]:
    """Tokens a second, forward and backward, of the first layer alone on one row of each length; or why not."""
    return {length: speed(layers[0], length, rounds) for length in effort.costed}


def speed(mixer: Mixer, length: int, rounds: int) -> float | str:
    """Median over samples."""
    module = mixer.build(WIDTH, LAYERS, GPT2Init(0.1), "mixer")
    context = Context(jnp.arange(length, dtype=jnp.int32)[None])
    x = jax.random.normal(jax.random.key(0), (1, length, WIDTH))
    params = jax.jit(module.init)(jax.random.key(1), x[:, :8], Context(context.positions[:, :8])).get("params", {})

    def loss(params: Any, x: Any) -> Any:
        return jnp.sum(module.apply({"params": params}, x, context)[0])

    compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(params, x).compile()
    needed = compiled.memory_analysis().temp_size_in_bytes
    if needed > MOST_BYTES:
        return f"needs {needed / 2**30:.0f} GiB"
    return length / statistics.median(interleaved({"layer": lambda: compiled(params, x)}, rounds)["layer"])


# ---- the whole -------------------------------------------------------------------------------------------------------


def pin(cores: Any) -> None:
    """Give this process a core of its own."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {cores.get()})


def job(section: str, name: str, spec: Any, effort: Effort) -> tuple[str, str, dict[str, Any]]:
    """One run, in a process of the pool."""
    return section, name, SECTIONS[section](spec, effort)


def train_all(jobs: list[tuple[str, str, Any]], effort: Effort) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """The records of all runs as they are done, as many at a time as there are cores."""
    fresh = multiprocessing.get_context("spawn")
    free = fresh.Queue()
    for core in cores():
        free.put(core)
    with ProcessPoolExecutor(len(cores()), fresh, initializer=pin, initargs=(free,)) as pool:
        for done in as_completed([pool.submit(job, *arguments, effort) for arguments in jobs]):
            yield done.result()


def cores() -> list[int]:
    """The cores that this process may use."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def environment() -> dict[str, Any]:
    """Where and when something was measured."""
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    return {"date": today, "cores": len(cores()), "python": platform.python_version(), **versions}


def wanted(sections: dict[str, dict[str, Any]], only: list[str]) -> list[tuple[str, str, Any]]:
    """(section, name, spec) of the runs named in `only` (names or sections); of all where it is empty."""
    listed = [(section, name, spec) for section, specs in sections.items() for name, spec in specs.items()]
    known = {"none", "speed", *sections, *(name for _, name, _ in listed)}
    if unknown := [name for name in only if name not in known]:
        raise SystemExit(f"unknown: {', '.join(unknown)}; there is {', '.join(sorted(known))}")
    return [entry for entry in listed if not only or entry[0] in only or entry[1] in only]


def measure(folder: Path, only: list[str], effort: Effort, pooled: bool = True) -> dict[str, Any]:
    """Run what is wanted, merge it into `folder/mixers.json` after each run, and write the page and its picture."""
    found, left_out = mixers()
    jobs = wanted({"mixers": found, "sizes": SIZES, "positions": POSITIONS}, only)
    path = folder / "mixers.json"
    results = json.loads(path.read_text()) if path.exists() else {section: {} for section in SECTIONS}
    results["left_out"], results["setting"] = left_out, setting(effort)
    known = {"mixers": found, "sizes": SIZES, "positions": POSITIONS}
    for section, specs in known.items():  # what is gone from the code is gone from the page
        results[section] = {name: record for name, record in results[section].items() if name in specs}
    specs = {(section, name): spec for section, name, spec in jobs}
    runs = train_all(jobs, effort) if pooled else (job(*arguments, effort) for arguments in jobs)
    for section, name, record in runs:
        results[section][name] = record | {"environment": environment()}
        print(f"{section}: {name}", flush=True)
        path.write_text(json.dumps(results, indent=1) + "\n")
    timed = results["mixers"] if "speed" in only else [name for section, name in specs if section == "mixers"]
    for name in timed:
        results["mixers"][name] |= {"tokens_per_second": speeds(found[name], effort), "timed": environment()}
        print(f"speed: {name}", flush=True)
    path.write_text(json.dumps(results, indent=1) + "\n")
    results = json.loads(path.read_text())
    (folder / "mixers.md").write_text(page(results))
    figure(results).savefig(folder / "mixers.png", dpi=160)
    return results


def setting(effort: Effort) -> dict[str, Any]:
    """What all runs share, for the page."""
    tasks = {name: repr(task) for name, task in TASKS.items()}
    shared = {
        "done": DONE,
        "width": WIDTH,
        "layers": LAYERS,
        "length": LENGTH,
        "batch": BATCH,
        "rate": RATE,
        "steps": effort.steps,
    }
    return {**shared, "tasks": tasks, "tested": effort.tested}


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[], help="names of runs or sections; none for the page")
    parser.add_argument("--quick", action="store_true", help="a few steps: to see that it works")
    parser.add_argument("--out", type=Path, default=DOCS, help="folder of the three files (docs)")
    arguments = parser.parse_args()
    effort = QUICK if arguments.quick else Effort()
    measure(arguments.out, arguments.only, effort, pooled=not arguments.quick)


if __name__ == "__main__":
    main()
