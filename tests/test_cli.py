"""The `llmjax` command: exit codes, lines on stderr, JSON on the last line of stdout, and every verb on a tiny run."""

import contextlib
import errno
import hashlib
import importlib
import io
import json
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax import plan
from llmjax.cli import jsonable, main, read
from llmjax.cli import progress as progress_bar
from llmjax.cli.commands import list as listing
from llmjax.cli.text import duration, megabytes, short, table
from llmjax.cli.verbs import VERBS
from llmjax.config import InputError, with_
from llmjax.experiment import load_experiment
from llmjax.train import checkpoint
from llmjax.train.errors import RunError

ROOT = Path(__file__).resolve().parent.parent
EXPERIMENT = '''"""A run of a few seconds."""

from llmjax.data import Bytes, Data, InMemory
from llmjax.decode.config import Generate
from llmjax.experiment import Experiment
from llmjax.nn.attention import Attention
from llmjax.nn.block import Block
from llmjax.nn.decoder import Decoder
from llmjax.nn.mlp import MLP
from llmjax.train.config import Train
from llmjax.train.optimizers import AdamW
from llmjax.train.schedules import Constant


def experiment() -> Experiment:
    texts = tuple(f"document {n} says {n * n} and then says {n} again" for n in range(40))
    return Experiment(
        name="speck",
        model=Decoder(vocab=257, d_model=16, layers=1, pattern=(Block(mixer=Attention(heads=2), mlp=MLP()),)),
        data=Data(source=InMemory(texts=texts, holdout=0.25), tokenizer=Bytes(), length=32, batch_size=4),
        optimizer=AdamW(schedule=Constant(learning_rate=0.01)),
        train=Train(steps=4, log_every=2, eval_every=2, checkpoint_every=2),
        generate=Generate(prompt="document", max_tokens=8, temperature=0.0),
    )


def other() -> Experiment:
    """The same with another seed."""
    import dataclasses

    return dataclasses.replace(experiment(), seed=1)
'''


class Called(NamedTuple):
    """What a call of the command left behind."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        return json.loads(self.out.splitlines()[-1])


def call(*words: object) -> Called:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(word) for word in words])
    return Called(code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with an experiment file, in which this module's caches are kept too."""
    path = tmp_path_factory.mktemp("cli")
    (path / "speck.py").write_text(EXPERIMENT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLMJAX_CACHE", str(path / "cache"))
        yield path


@pytest.fixture(scope="module")
def trained(folder: Path) -> Called:
    """The run `folder/run` of four steps."""
    called = call("train", folder / "speck.py", f"--run-dir={folder / 'run'}", "--json")
    assert called.code == 0, called.err
    return called


# ---- help and the shell's side ---------------------------------------------------------------------------------------


def test_help_is_quick_and_does_not_import_jax() -> None:
    """Best of five under 0.4 s, as a process of its own."""
    code = (
        "import sys; from llmjax.cli import main; code = main(['--help']); print('jax' in sys.modules); sys.exit(code)"
    )
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
        seconds.append(time.perf_counter() - start)
    assert done.stdout.splitlines()[-1] == "False"
    assert all(verb in done.stdout for verb in VERBS)
    assert min(seconds) < 0.4


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself_with_an_example_that_it_understands(verb: str) -> None:
    """`--help` exits 0 and ends with an example; the example's own words are read without complaint."""
    called = call(verb, "--help")
    assert called.code == 0
    example = called.out.partition("example:\n")[2].strip()
    words = shlex.split(example)
    assert words[:2] == ["llmjax", verb]
    assert read(VERBS[verb], words[2:]) is not None
    assert callable(importlib.import_module(f"llmjax.cli.commands.{VERBS[verb].module or verb}").run)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("trian",), "unknown verb trian: did you mean train?"),
        (
            ("xyz",),
            (
                "unknown verb xyz: the verbs are train, eval, generate, show, plan, launch, "
                "import, export, list, plot, diff"
            ),
        ),
        (("train",), "llmjax train: the following arguments are required: EXPERIMENT: see llmjax train --help"),
        (("plot", "a", "--ouf=b"), "llmjax plot does not know --ouf=b: did you mean --out?"),
        (("train", "nowhere.py"), "cannot read the experiment file nowhere.py: No such file or directory"),
        (("train", "{file}:tyni"), "{file} has no function tyni: it has experiment, other"),
        (("train", "{file}", "--train.step=3"), "unknown field train.step: did you mean train.steps?"),
        (("train", "{file}", "--train.steps=many"), "train.steps=many: expected int"),
        (("train", "{file}", "--train.steps", "3"), "cannot read '--train.steps': write --path.to.field=value"),
        (
            ("show", "{file}", "--model.pattern.0.mixer=Attention(heads=4,kv_heads=3)"),
            "model.pattern.0.mixer.kv_heads=3 does not divide heads=4: use 1, 2 or 4",
        ),
        (
            ("eval", "{folder}/cache-less"),
            "{folder}/cache-less is no run directory: config.json: No such file or directory",
        ),
        (("generate", "{folder}"), "{folder} is no run directory: config.json: No such file or directory"),
        (("plot", "{folder}"), "{folder} holds no metrics.jsonl: train first, or name another run directory"),
        (("diff", "{file}", "gone.py"), "cannot read the experiment file gone.py: No such file or directory"),
        (
            ("list", "Atention"),
            "no component or kind is called Atention: did you mean Attention, Retention, LSHAttention?",
        ),
        (("train", "{file}", "--run-dir={file}"), "--run-dir={file} is a file: give a directory"),
        (
            ("train", "{file}", "--run-dir={folder}"),
            "--run-dir={folder} holds files but no config.json: give a new or an empty directory",
        ),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(folder: Path, words: tuple[str, ...], line: str) -> None:
    """Golden lines, one for each way to get it wrong."""
    names = {"file": folder / "speck.py", "folder": folder}
    called = call(*(word.format(**names) for word in words))
    assert (called.code, called.err) == (2, f"error: {line.format(**names)}\n")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (RunError("the loss was not finite\nfor ten steps"), 1),
        (OSError(errno.ENOSPC, "No space left on device"), 1),
        (InputError("no such thing"), 2),
        (KeyboardInterrupt(), 130),
    ],
)
def test_failures_are_one_line(monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int) -> None:
    """What a run may fail with is told in one line without a traceback."""
    monkeypatch.setattr("llmjax.cli.commands.list.run", lambda arguments: (_ for _ in ()).throw(error))
    called = call("list")
    assert called.code == code
    assert re.fullmatch(r"error: [^\n]+\n", called.err)


def test_a_defect_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    """What nobody foresaw is not hidden."""
    monkeypatch.setattr("llmjax.cli.commands.list.run", lambda arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["list"])


# ---- the verbs on a run ----------------------------------------------------------------------------------------------


def test_train_leaves_a_run_directory_and_says_what_it_reached(folder: Path, trained: Called) -> None:
    """The files that a run directory holds, the keys of the JSON object, and the arithmetic on top."""
    run_dir, result = folder / "run", trained.json
    assert {"config.json", "metrics.jsonl", "checkpoints", "plots", "report.html"} <= {
        p.name for p in run_dir.iterdir()
    }
    assert {"loss.png", "bits_per_byte.png", "learning_rate.png", "throughput.png"} <= {
        p.name for p in (run_dir / "plots").iterdir()
    }
    assert {"val_bits_per_byte", "tokens_per_second", "train_seconds", "compile_seconds"} <= result.keys()
    assert (result["steps"], result["run_dir"], result["stopped"]) == (4, str(run_dir), "done")
    assert result["compressors"].keys() == {"zlib", "bz2", "xz"}
    assert 0 < result["ngram_bits_per_byte"] < 8
    assert "4 x 32 = 128" in trained.out
    assert len(re.findall(r"^step \d/4  loss .* tokens/s", trained.out, re.MULTILINE)) == 2
    assert len(re.findall(r"^step \d/4  held out: ", trained.out, re.MULTILINE)) == 2


def test_eval_measures_what_training_measured_last(folder: Path, trained: Called) -> None:
    """The same parameters and text: equal up to the order of float32 sums (1e-5 relative); perplexity is exp(nll)."""
    called = call("eval", folder / "run", "--checkpoint=last", "--json")
    assert called.code == 0, called.err
    for name in ("val_nll", "val_bits_per_byte", "val_accuracy", "val_perplexity"):
        assert called.json[name] == pytest.approx(trained.json[name], rel=1e-5)
    assert called.json["val_perplexity"] == pytest.approx(np.exp(called.json["val_nll"]), rel=1e-12)
    assert called.json["step"] == 4


def test_generate_prints_prompt_and_text_and_gives_tokens(folder: Path, trained: Called) -> None:
    """For the byte tokenizer tokens are bytes of the text; greedy draws have probability one."""
    called = call("generate", folder / "run", "--prompt=says ", "--json")
    assert called.code == 0, called.err
    found = called.json
    assert bytes(token for token in found["tokens"] if token < 256).decode(errors="replace") == found["text"]
    assert found["log_probs"] == [0.0] * len(found["tokens"])
    assert max(found["model_log_probs"]) <= 0
    assert called.out.startswith("says ")
    assert call("generate", folder / "run", "--prompt=says ", "--json").json == found


def test_show_says_where_a_run_stands(folder: Path, trained: Called) -> None:
    """`params_sha256` is over the bytes in path order, computed here from the arrays one by one."""
    found = call("show", folder / "run", "--json").json
    experiment = load_experiment(str(folder / "run"))
    params = checkpoint.newest(folder / "run", print).params(experiment.model.abstract())
    leaves = {
        "/".join(str(key.key) for key in path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    data = b"".join(leaves[path].tobytes() for path in sorted(leaves))
    assert found["params_sha256"] == hashlib.sha256(data).hexdigest()
    assert (found["step"], found["num_params"]) == (4, sum(leaf.size for leaf in leaves.values()))
    assert found["num_params"] == sum(row["size"] for row in found["parameters"])
    assert found["config"]["train"]["steps"] == 4


@pytest.mark.parametrize(
    "words", [("list",), ("list", "Attention"), ("diff", "{file}", "{file}:other"), ("plot", "{run}")]
)
def test_every_verb_ends_with_one_json_object(folder: Path, trained: Called, words: tuple[str, ...]) -> None:
    """The last line of stdout parses; without --json it is not there."""
    words = tuple(word.format(file=folder / "speck.py", run=folder / "run") for word in words)
    called = call(*words, "--json")
    assert (called.code, type(called.json)) == (0, dict)
    if words[0] == "diff":
        assert called.json["differences"] == [{"path": "seed", "a": 0, "b": 1}]
    assert not call(*words).out.splitlines()[-1].startswith("{")


@pytest.mark.slow
def test_a_run_goes_on_only_with_the_same_experiment(folder: Path, trained: Called) -> None:
    """Another seed is refused with path and both values, nothing touched; 2 + 2 steps end bitwise where 4 do."""
    run_dir = folder / "continued"
    file = folder / "speck.py"
    assert call("train", file, f"--run-dir={run_dir}", "--train.steps=2").code == 0
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    refused = call("train", file, f"--run-dir={run_dir}", "--seed=5")
    assert refused.code == 2
    assert re.fullmatch(rf"error: {run_dir} holds another run \(seed: 0 -> 5\): [^\n]+\n", refused.err)
    assert {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()} == before
    continued = call("train", run_dir, "--train.steps=4", "--json")
    assert (continued.code, continued.json["steps"]) == (0, 4)
    assert "going on from step 2" in continued.out
    digests = [call("show", path, "--json").json["params_sha256"] for path in (run_dir, folder / "run")]
    assert digests[0] == digests[1]


@pytest.mark.slow
def test_a_signal_saves_and_exits_with_0(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGTERM after the first line of metrics: the step is saved, no report is made, and the command goes on later."""
    show = progress_bar.Progress.__call__

    def stop_after_first_line(self: progress_bar.Progress, event: dict[str, Any]) -> None:
        show(self, event)
        if event["event"] == "log":
            signal.raise_signal(signal.SIGTERM)

    words = ("train", folder / "speck.py", f"--run-dir={folder / 'stopped'}", "--json")
    with monkeypatch.context() as patch:
        patch.setattr(progress_bar.Progress, "__call__", stop_after_first_line)
        called = call(*words)
    assert (called.code, called.json["stopped"], called.json["steps"]) == (0, "signal", 2)
    assert not (folder / "stopped" / "report.html").exists()
    assert call(*words).json["steps"] == 4


def test_bad_data_leaves_the_directory_free(folder: Path) -> None:
    """A run that never began because a data file is bad may begin again under the same name, corrected."""
    bad = folder / "bad.jsonl"
    bad.write_text('{"text": "fine"}\nno json\n')
    words = ("train", folder / "speck.py", f"--run-dir={folder / 'fresh'}", "--train.steps=1")
    called = call(*words, f"--data.source=JSONL(path={str(bad)!r})")
    assert called.code == 2
    assert called.err.startswith(f"error: {bad}:2: ")
    assert called.err.count("\n") == 1
    assert call(*words).code == 0


def test_a_checkpoint_that_is_not_kept_is_named(folder: Path, trained: Called) -> None:
    """`--checkpoint` takes best, last or a step that is there."""
    called = call("eval", folder / "run", "--checkpoint=3")
    assert called.code == 2
    assert re.fullmatch(
        r"error: --checkpoint=3: expected best, last or a step that is kept in \S+ \([\d, ]+\)\n", called.err
    )


# ---- the plan --------------------------------------------------------------------------------------------------------


def test_state_bytes_are_those_of_the_real_arrays(folder: Path) -> None:
    """Parameters and optimizer state, byte for byte against arrays that were made."""
    experiment = load_experiment(str(folder / "speck.py"))
    params = experiment.model.init(jax.random.key(0))
    opt_state = experiment.optimizer.build(params).init(params)
    needed = plan.memory(experiment)
    assert needed["parameters"] == sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert needed["optimizer_state"] == sum(leaf.nbytes for leaf in jax.tree.leaves(opt_state))
    state = experiment.model.init_state(1, 64, "float32")["blocks"]
    assert needed["kv_cache_per_token"] * 64 == sum(leaf.nbytes for leaf in jax.tree.leaves(state))


def test_activations_are_what_a_backward_pass_keeps() -> None:
    """Closed form: sum(sin(x W)) keeps cos(x W) alone (the inputs are there anyway): rows x columns float32."""
    step = SimpleNamespace(loss=lambda params, batch, key: (jnp.sum(jnp.sin(batch["x"] @ params["w"])), {}))
    state = SimpleNamespace(params={"w": jax.ShapeDtypeStruct((5, 7), jnp.float32)}, frozen={})
    batch = {"x": jax.ShapeDtypeStruct((3, 5), jnp.float32)}
    assert plan.activation_bytes(step, state, batch) == 3 * 7 * 4


def test_activations_shrink_with_rematerialisation_and_with_accumulation(folder: Path) -> None:
    """What is recomputed is not kept; half the rows keep half as much, but for what does not grow with rows."""
    experiment = load_experiment(str(folder / "speck.py"))
    kept = [plan.memory(with_(experiment, "model.remat", name))["activations"] for name in ("none", "dots", "full")]
    assert kept[0] > kept[1] > kept[2]
    halved = plan.memory(with_(experiment, "train.accumulate", 2))["activations"]
    assert 0.45 < halved / kept[0] < 0.6


# ---- lists, experiments and words ------------------------------------------------------------------------------------


def test_list_knows_the_components_of_every_kind() -> None:
    """One well-known name of each of some kinds; every component says in a line what it is."""
    kinds = listing.components()
    expected = {
        "Mixer": "Attention",
        "Optimizer": "AdamW",
        "Source": "JSONL",
        "Schedule": "Cosine",
        "FeedForward": "GLU",
    }
    assert all(name in kinds[kind] for kind, name in expected.items())
    assert all(listing.summary(cls) for classes in kinds.values() for cls in classes.values())


SPECS = [
    str(Path(spec).relative_to(ROOT)) if Path(spec).is_absolute() else spec
    for spec in listing.experiments(ROOT / "experiments")
]


@pytest.mark.parametrize("spec", SPECS)
def test_every_experiment_loads_and_says_what_it_costs(spec: str) -> None:
    """Each file opens with what it is, what it costs, what to expect and the command; each variant is valid."""
    text = (ROOT / spec.partition(":")[0]).read_text()
    opening = text.partition('"""\n\n')[0]
    assert all(f"\n{word}" in opening for word in ("What:", "Cost:", "Run:"))
    assert "\nExpect:" in opening or "Not timed yet" in opening
    experiment = load_experiment(str(ROOT / spec))
    assert plan.arithmetic(experiment)["tokens_per_step"] == experiment.data.batch_size * experiment.data.length


def test_numbers_are_written_for_readers() -> None:
    """A few by hand."""
    assert [short(x) for x in (4.19e6, 999, 1.5e13)] == ["4.19M", "999", "15T"]
    assert [megabytes(x) for x in (12, 2048, 3 * 2**20)] == ["12 B", "2.0 KiB", "3.0 MiB"]
    assert [duration(x) for x in (7, 750, 3723)] == ["0:07", "12:30", "1:02:03"]
    assert table([("a", "10"), ("bcd", "2")], right=(1,)) == "a    10\nbcd   2"


def test_json_holds_no_number_that_json_cannot_write() -> None:
    """NaN and infinity become null, arrays lists, paths text."""
    value = {"a": float("nan"), "b": np.array([1.0, np.inf]), "c": (Path("x"), True, 2, None)}
    assert jsonable(value) == {"a": None, "b": [1.0, None], "c": ["x", True, 2, None]}
