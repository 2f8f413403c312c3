"""Experiments: files and variants, run directories, what is saved, what a resumed run may change."""

import dataclasses
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from llmjax import config as configs
from llmjax import experiment as experiments
from llmjax.config import ConfigError
from llmjax.experiment import Experiment, compatible, differences, load, load_experiment, load_record, save
from llmjax.nn.decoder import Decoder
from llmjax.nn.positions import LearnedPositions
from llmjax.train.optimizers import AdamW, Muon

ROOT = Path(experiments.__file__).parent.parent
FILE = """
    from dataclasses import dataclass, replace
    from llmjax.experiment import Experiment
    from llmjax.nn.positions import Positions

    @dataclass(frozen=True)
    class Mine(Positions):
        width: int = 3

    def experiment():
        return Experiment(name="mine")

    def tiny():
        base = experiment()
        return replace(base, model=replace(base.model, d_model=16, positions=Mine(width=5)))

    def number():
        return 3

    def broken():
        return undefined_name

    def _helper():
        return experiment()
"""


def write(folder: Path, text: str = FILE, name: str = "foo.py") -> str:
    (folder / name).write_text(textwrap.dedent(text))
    return str(folder / name)


def message(spec: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_experiment(spec, overrides)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


# ---- files -----------------------------------------------------------------------------------------------------------


def test_file_variant_and_override(tmp_path):
    spec = write(tmp_path)
    assert load_experiment(spec) == Experiment(name="mine")
    tiny = load_experiment(f"{spec}:tiny", ["--model.positions.width=7", "--optimizer=Muon", "--seed=1"])
    assert (tiny.model.d_model, tiny.model.positions.width, tiny.optimizer, tiny.seed) == (16, 7, Muon(), 1)


def test_a_class_of_the_file_is_known_by_name(tmp_path):
    spec = write(tmp_path)
    load_experiment(spec)
    assert load_experiment(spec, ["--model.positions=Mine(width=9)"]).model.positions.width == 9


def test_the_same_text_gives_the_same_classes_and_a_new_text_is_run(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    spec = write(tmp_path)
    os.utime(spec, (1e9, 1e9))
    first, again = load_experiment(f"{spec}:tiny"), load_experiment(f"{spec}:tiny")
    assert first == again
    write(
        tmp_path, FILE.replace("width=5", "width=6")
    )  # same length, and then the same time: a cached compilation would pass for current
    os.utime(spec, (1e9, 1e9))
    assert load_experiment(f"{spec}:tiny").model.positions.width == 6


def test_a_file_may_import_its_neighbours(tmp_path, monkeypatch):
    write(tmp_path, name="neighbour_of_foo.py")
    spec = write(
        tmp_path, "from neighbour_of_foo import tiny as experiment_of\ndef experiment():\n    return experiment_of()\n"
    )
    before = list(sys.path)
    assert load_experiment(spec).model.d_model == 16
    assert sys.path == before


@pytest.mark.parametrize(
    ("spec", "overrides", "expected"),
    [
        ("missing.py", [], "cannot read the experiment file missing.py: No such file or directory"),
        ("foo.py:tin", [], "foo.py has no function tin: did you mean tiny?"),
        ("foo.py:zzz", [], "foo.py has no function zzz: it has experiment, tiny, number, broken"),
        ("foo.py:number", [], "foo.py: number() returned int, not an Experiment"),
        ("foo.py:broken", [], "foo.py:21: NameError: name 'undefined_name' is not defined"),
        ("foo.py", ["--sede=1"], "unknown field sede: did you mean seed, generate.seed?"),
        ("foo.py", ["--seed=-1"], "seed=-1 must be at least 0 and below 2**63"),
        ("syntax.py", [], "syntax.py:2: SyntaxError: expected ':'"),
        ("config_error.py", [], "config_error.py: unknown field sede: did you mean seed, generate.seed?"),
        ("empty.py", [], "empty.py has no function experiment: it defines no function"),
        ("binary.py", [], "cannot read the experiment file binary.py: not UTF-8 text"),
        ("import_error.py", [], "import_error.py:1: ModuleNotFoundError: No module named 'no_such_module'"),
    ],
)
def test_errors_to_the_letter(spec, overrides, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path)
    write(tmp_path, "x = 1\ndef experiment()\n", "syntax.py")
    write(tmp_path, "", "empty.py")
    write(tmp_path, "import no_such_module\n", "import_error.py")
    (tmp_path / "binary.py").write_bytes(b"\xff\xfe\x00")
    text = "from llmjax.config import with_\nfrom llmjax.experiment import Experiment\n"
    write(tmp_path, f"{text}def experiment():\n    return with_(Experiment(), 'sede', 1)\n", "config_error.py")
    assert message(spec, *overrides) == expected


def test_a_file_that_failed_leaves_no_module(tmp_path):
    before = set(sys.modules)
    message(write(tmp_path, "raise ValueError('no')\n"))
    assert not {name for name in set(sys.modules) - before if name.startswith("llmjax_experiment")}


# ---- run directories -------------------------------------------------------------------------------------------------


def test_save_and_load(tmp_path):
    spec = f"{write(tmp_path)}:tiny"
    experiment = load_experiment(spec)
    path = save(experiment, tmp_path / "run", ["llmjax", "train", spec], spec)
    assert path == tmp_path / "run" / "config.json"
    assert load(tmp_path / "run") == experiment
    assert load_experiment(str(tmp_path / "run"), ["--seed=3"]).seed == 3
    record = load_record(tmp_path / "run")
    assert record["argv"] == ["llmjax", "train", spec]
    assert record["source"]["text"] == (tmp_path / "foo.py").read_text()
    assert record["python"] == sys.version.split()[0]
    import jax

    assert record["packages"]["jax"] == jax.__version__
    assert record["config"]["optimizer"]["weight_decay"] == AdamW().weight_decay  # a default
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.json"]


def test_a_fresh_process_finds_the_classes_of_the_file(tmp_path):
    spec = f"{write(tmp_path)}:tiny"
    save(load_experiment(spec), tmp_path / "run", [], spec)
    modules = configs.to_dict(load(tmp_path / "run"))["model"]["positions"]["_type"].partition(":")[0]
    del sys.modules[modules]  # as in another process
    assert load(tmp_path / "run").model.positions.width == 5
    del sys.modules[modules]
    (tmp_path / "foo.py").unlink()
    with pytest.raises(ConfigError, match=r"cannot read the experiment file .*foo.py: No such file"):
        load(tmp_path / "run")


def test_a_run_without_own_classes_needs_no_file(tmp_path):
    spec = write(tmp_path)
    save(load_experiment(spec), tmp_path / "run", [], spec)
    write(tmp_path, "raise RuntimeError('must not run')\n")
    assert load(tmp_path / "run").name == "mine"


def test_git_commit_and_dirty_flag(tmp_path):
    def git(*arguments):
        author = ["-c", "user.name=a", "-c", "user.email=a@b"]
        result = subprocess.run(["git", *author, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True)
        return result.stdout.strip()

    spec = write(tmp_path)
    save(load_experiment(spec), tmp_path / "out", [], spec)
    git("init")
    git("add", "foo.py")
    git("commit", "-m", "one")
    save(load_experiment(spec), tmp_path / "out", [], spec)
    assert load_record(tmp_path / "out")["git"] == {"commit": git("rev-parse", "HEAD"), "dirty": False}
    write(tmp_path, FILE.replace("number", "figure"))
    save(load_experiment(spec), tmp_path / "out", [], spec)
    assert load_record(tmp_path / "out")["git"]["dirty"]


def test_no_git_is_no_error(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    save(Experiment(), tmp_path / "run")
    assert load_record(tmp_path / "run")["git"] is None


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    save(Experiment(seed=1), tmp_path)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save(Experiment(seed=2), tmp_path)
    monkeypatch.undo()
    assert load(tmp_path).seed == 1
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, r"run is no run directory: config.json: No such file or directory$"),
        ("{", r"config.json is not JSON: Expecting property name"),
        ("[]", r"config.json holds no experiment: expected an object with the key config$"),
        ('{"config": {"_type": "llmjax.nn.norms:RMSNorm"}}', r"config.json: missing field"),
    ],
)
def test_damaged_run_directories(text, expected, tmp_path):
    (tmp_path / "run").mkdir()
    if text is not None:
        (tmp_path / "run" / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=expected):
        load(tmp_path / "run")


def test_another_config_is_no_experiment(tmp_path):
    save(Decoder(), tmp_path)
    with pytest.raises(ConfigError, match=r"config.json holds Decoder, not an Experiment$"):
        load(tmp_path)


def test_a_run_directory_names_no_module_to_import(tmp_path):
    save(Experiment(), tmp_path)
    record = json.loads((tmp_path / "config.json").read_text())
    record["config"]["model"]["_type"] = "antigravity:Model"
    record["source"] = {"path": "relative.py"}
    (tmp_path / "config.json").write_text(json.dumps(record))
    with pytest.raises(ConfigError, match="no config class antigravity:Model here"):
        load(tmp_path)
    assert "antigravity" not in sys.modules


# ---- comparing, checking ---------------------------------------------------------------------------------------------


def test_what_a_resumed_run_may_change():
    old = Experiment()
    free = [
        "--train.steps=77",
        "--train.keep_last=4",
        "--data.cache_dir=elsewhere",
        "--mesh.fsdp=4",
        "--mesh=MeshConfig(data=2)",
    ]
    free += [f"--{path}=3" for path in configs.leaves(old) if path.startswith("train.") and path.endswith("_every")]
    assert compatible(old, configs.override(old, free)) == []
    new = configs.override(old, ["--seed=1", "--optimizer=Muon", "--train.steps=77"])
    assert [line.partition(":")[0] for line in compatible(old, new)] == ["optimizer", "seed"]
    assert differences(old, new)[-1] == "seed: 0 -> 1"


def test_learned_positions_bound_the_length():
    bad = Experiment(model=Decoder(vocab=4096, positions=LearnedPositions(length=4)))
    with pytest.raises(
        ConfigError, match=r"^data.length=\d+ exceeds the 4 learned positions: raise model.positions.length"
    ):
        configs.validate(bad)


def test_the_model_holds_the_vocabulary():
    with pytest.raises(ConfigError, match=r"^model.vocab=256 is below the 2048 token ids of data: raise it"):
        configs.validate(Experiment(model=Decoder(vocab=256)))


def test_the_batch_splits_over_the_mesh():
    bad = configs.override(Experiment(), ["--mesh=MeshConfig(data=2,fsdp=3)", "--data.batch_size=8"])
    with pytest.raises(ConfigError) as caught:
        configs.validate(bad)
    expected = "data.batch_size=8 does not split over train.accumulate x mesh.data x mesh.fsdp: use a multiple of 6"
    assert str(caught.value) == expected
    configs.validate(configs.override(bad, ["--data.batch_size=12", "--train.accumulate=2"]))
    with pytest.raises(ConfigError, match="use a multiple of 3"):
        configs.validate(configs.override(Experiment(), ["--train.accumulate=3", "--data.batch_size=8"]))


def test_the_whole_experiment_round_trips():
    experiment = Experiment()
    configs.validate(experiment)
    assert configs.from_dict(json.loads(json.dumps(configs.to_dict(experiment)))) == experiment
    assert len(configs.leaves(experiment)) <= 120
    for cls in {type(experiment), type(experiment.model), type(experiment.train), type(experiment.optimizer)}:
        assert configs.docs(cls).keys() >= {field.name for field in dataclasses.fields(cls)}
