"""Configs: overrides typed by field, swaps, errors to the letter, round trips, and what a config may never do."""

import dataclasses
import enum
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import hypothesis
import hypothesis.strategies as st
import pytest

from llmjax import config as configs
from llmjax.config import ConfigError, InputError


class Colour(enum.Enum):
    RED = "r"
    BLUE = "b"


@dataclasses.dataclass(frozen=True)
class Mix:
    """Base of the mixers."""


@dataclasses.dataclass(frozen=True)
class Gqa(Mix):
    heads: int = 8
    """query heads"""
    kv_heads: int | None = None
    """key heads; None
    for as many"""
    rope: bool = True

    def problems(self) -> Iterator[tuple[str, str]]:
        if self.kv_heads and self.heads % self.kv_heads:
            yield "kv_heads", f"does not divide heads={self.heads}: use 1, 2, 4 or 8"


@dataclasses.dataclass(frozen=True)
class Latent(Gqa):
    rank: int = 16


@dataclasses.dataclass(frozen=True)
class Ssm(Mix):
    d_state: int = 4


@dataclasses.dataclass(frozen=True)
class _Private(Mix):
    x: int = 1


class NoDataclass(Mix):
    pass


@dataclasses.dataclass(frozen=True)
class Layer:
    mixer: Mix = Latent()
    dropout: float = 0.0


@dataclasses.dataclass(frozen=True)
class Net:
    num_layers: int = 2
    pattern: tuple[Layer, ...] = (Layer(), Layer(mixer=Gqa()))
    dtype: Literal["float32", "bfloat16", "none"] = "float32"
    attention: Gqa | Ssm = Ssm()
    extra: Layer | None = None


@dataclasses.dataclass(frozen=True)
class Optim:
    learning_rate: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.95)
    names: tuple[str, ...] = ()
    clip: float | None = 1.0
    note: str | None = None
    path: str = "a"
    colour: Colour = Colour.RED
    size: int | float = 1


@dataclasses.dataclass(frozen=True)
class Tree:
    model: Net = Net()
    optimizer: Optim = Optim()
    steps: int = 100
    fast: bool = False


def get(config, path):
    for part in path.split("."):
        config = config[int(part)] if part.isdigit() else getattr(config, part)
    return config


# ---- overrides -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "text", "value"),
    [
        ("model.num_layers", "4", 4),
        ("steps", "1e3", 1000),
        ("steps", "-3", -3),
        ("steps", "1_000", 1000),
        ("optimizer.learning_rate", "1", 1.0),
        ("optimizer.learning_rate", "-1e-4", -1e-4),
        ("optimizer.learning_rate", "inf", math.inf),
        ("optimizer.learning_rate", "-inf", -math.inf),
        *[("fast", text, True) for text in ("True", "true", "1")],
        *[("fast", text, False) for text in ("False", "false", "0")],
        ("model.dtype", "none", "none"),
        ("optimizer.clip", "None", None),
        ("optimizer.clip", "none", None),
        ("optimizer.clip", "2", 2.0),
        ("optimizer.betas", "(0.8, 0.9)", (0.8, 0.9)),
        ("optimizer.betas", "0.8,1", (0.8, 1.0)),
        ("optimizer.betas", "[0.8,0.9]", (0.8, 0.9)),
        ("optimizer.betas.1", "0.99", 0.99),
        ("optimizer.names", "()", ()),
        ("optimizer.names", "one", ("one",)),
        ("optimizer.names", "'a','b'", ("a", "b")),
        ("optimizer.names", "a/b.txt,c*d", ("a/b.txt", "c*d")),
        ("optimizer.names", r"^a(.*)$,\.bias", ("^a(.*)$", r"\.bias")),
        ("optimizer.names", r"('\n\n',)", ("\n\n",)),
        ("optimizer.note", "none", None),
        ("optimizer.note", "'none'", "none"),
        ("optimizer.note", "a b  c#d", "a b  c#d"),
        ("optimizer.note", "x#y", "x#y"),
        ("optimizer.note", "3", "3"),
        ("optimizer.path", " 'as it is' = x", " 'as it is' = x"),
        ("optimizer.path", "None", "None"),
        ("optimizer.colour", "BLUE", Colour.BLUE),
        ("optimizer.colour", "b", Colour.BLUE),
        ("optimizer.size", "2", 2),
        ("optimizer.size", "2.0", 2.0),
        ("model.dtype", "bfloat16", "bfloat16"),
        ("model.attention.d_state", "8", 8),
        ("model.attention", "Gqa", Gqa()),
        ("model.attention", "Gqa(kv_heads=4, rope=False)", Gqa(kv_heads=4, rope=False)),
        ("model.pattern.0.mixer", "Gqa(heads=1e1)", Gqa(heads=10)),
        ("model.pattern.1.mixer.heads", "2", 2),
        ("model.pattern.1", "Layer(mixer=Ssm(d_state=2))", Layer(mixer=Ssm(d_state=2))),
        ("model.pattern", "(Layer(mixer=Gqa(heads=2)), Layer())", (Layer(mixer=Gqa(heads=2)), Layer())),
        ("model.pattern", "Layer", (Layer(),)),
        ("model.extra", "Layer(dropout=.5)", Layer(dropout=0.5)),
        ("model.extra", "none", None),
        ("model", "Net(num_layers=3)", Net(num_layers=3)),
    ],
)
def test_override(path, text, value):
    changed = get(configs.override(Tree(), [f"--{path}={text}"]), path)
    assert changed == value
    assert type(changed) is type(value)


def test_override_changes_one_leaf_and_not_the_original():
    tree = Tree()
    changed = configs.override(tree, ["--model.pattern.1.mixer.heads=4"])
    assert configs.diff(tree, changed) == [("model.pattern.1.mixer.heads", 8, 4)]
    assert tree == Tree()


def test_last_writer_wins():
    assert configs.override(Tree(), ["--steps=1", "--steps=2"]).steps == 2
    swapped = configs.override(Tree(), ["--model.attention=Gqa(heads=4)", "--model.attention.heads=2"])
    assert swapped.model.attention == Gqa(heads=2)
    assert configs.override(swapped, ["--model.attention=Gqa"]).model.attention == Gqa()


def test_union_default_is_kept():
    # A peer's parser dropped the default of a union field and took the first member.
    assert configs.override(Tree(), ["--steps=1"]).model.attention == Ssm()


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ("--model.num_layer=4", "unknown field model.num_layer: did you mean model.num_layers?"),
        ("--lr=1", "unknown field lr: did you mean optimizer.learning_rate?"),
        ("--optim.lr=1", "unknown field optim.lr: did you mean optimizer.learning_rate?"),
        ("--learning_rate=1", "unknown field learning_rate: did you mean optimizer.learning_rate?"),
        (
            "--model.pattern.mixer.rank=1",
            "unknown field model.pattern.mixer.rank: did you mean model.pattern.0.mixer.rank?",
        ),
        ("--qqq=1", "unknown field qqq"),
        ("--steps.x=1", "unknown field steps.x"),
        (
            "--model.pattern.2.dropout=0",
            "unknown field model.pattern.2.dropout: model.pattern has 2 entries, counted from 0",
        ),
        (
            "--model.extra.dropout=0",
            "unknown field model.extra.dropout: model.extra is None, so set --model.extra first",
        ),
        ("--model.num_layers=four", "model.num_layers=four: expected int"),
        ("--model.num_layers=2.5", "model.num_layers=2.5: expected int"),
        ("--model.num_layers=True", "model.num_layers=True: expected int"),
        ("--model.num_layers='4'", "model.num_layers='4': expected int"),
        ("--model.num_layers=", "model.num_layers=: expected int"),
        ("--fast=2", "fast=2: expected bool"),
        ("--fast=yes", "fast=yes: expected bool"),
        ("--optimizer.clip=off", "optimizer.clip=off: expected float or None"),
        ("--optimizer.betas=0.9", "optimizer.betas=0.9: expected (float, float)"),
        ("--optimizer.betas=(0.9, x)", "optimizer.betas.1=x: expected float"),
        ("--optimizer.colour=green", "optimizer.colour=green: expected RED or BLUE"),
        ("--model.dtype=bf16", "model.dtype=bf16: expected float32 or bfloat16 or none"),
        ("--model.attention=Gqq", "model.attention=Gqq: expected Gqa (Gqa, Latent) or Ssm: did you mean Gqa?"),
        ("--model.pattern.0.mixer=Mix", "model.pattern.0.mixer=Mix: expected Mix (Gqa, Latent, Ssm)"),
        ("--model.pattern.0.mixer=None", "model.pattern.0.mixer=None: expected Mix (Gqa, Latent, Ssm)"),
        ("--model.attention=Gqa(4)", "model.attention=Gqa(4): name every argument, as in Gqa(field=value)"),
        ("--model.attention=Gqa(**x)", "model.attention=Gqa(**x): name every argument, as in Gqa(field=value)"),
        ("--model.attention=Gqa(kv_head=4)", "unknown field model.attention.kv_head of Gqa: did you mean kv_heads?"),
        ("--model.attention=Gqa(heads=two)", "model.attention.heads=two: expected int"),
        ("--model.pattern=(Layer(mixer=Gqa(heads=x)),)", "model.pattern.0.mixer.heads=x: expected int"),
        ("--model.pattern=7", "model.pattern.0=7: expected Layer"),
        ("--steps", "cannot read '--steps': write --path.to.field=value"),
        ("steps=1", "cannot read 'steps=1': write --path.to.field=value"),
        ("--=1", "cannot read '--=1': write --path.to.field=value"),
    ],
)
def test_errors_to_the_letter(item, message):
    with pytest.raises(ConfigError) as caught:
        configs.override(Tree(), [item])
    assert str(caught.value) == message


def test_at_most_three_suggestions():
    fields = [(f"rate_{letter}", int, 0) for letter in "abcdef"]
    wide = dataclasses.make_dataclass("Wide", fields, frozen=True)()
    with pytest.raises(ConfigError, match=r"did you mean rate_a, rate_b, rate_c\?$"):
        configs.override(wide, ["--rate_=1"])


@hypothesis.example(text="10", path="model.pattern.1.mixer.kv_heads")
@hypothesis.given(text=st.text(max_size=30), path=st.sampled_from(sorted(configs.leaves(Tree()))))
@hypothesis.settings(max_examples=300, deadline=None)
def test_any_text_gives_a_typed_value_or_one_line(path, text):
    message, changed = "one line", Tree()
    try:
        changed = configs.override(Tree(), [f"--{path}={text}"])
        configs.validate(changed)
    except ConfigError as error:
        message = str(error)
    assert len(message.splitlines()) == 1
    assert not configs.diff(changed, configs.from_dict(json.loads(json.dumps(configs.to_dict(changed)))))


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('touch HACKED')",
        "Gqa(heads=__import__('os').system('touch HACKED'))",
        "Gqa(heads=(lambda: 4)())",
        "[Gqa for _ in open('HACKED', 'w')]",
        "subprocess.Popen",
        "Gqa.__init__.__globals__",
        "Tree()",
    ],
)
def test_text_is_never_evaluated(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in ("model.attention", "model.pattern", "steps", "optimizer.clip"):
        with pytest.raises(ConfigError):
            configs.override(Tree(), [f"--{path}={text}"])
    assert not (tmp_path / "HACKED").exists()


def test_deep_nesting_is_one_line():
    with pytest.raises(ConfigError, match="expected int"):
        configs.override(Tree(), ["--steps=" + "(" * 10_000])


def test_own_checks_of_a_class_name_the_path():
    @dataclasses.dataclass(frozen=True)
    class Strict:
        x: int = 1

        def __post_init__(self):
            if self.x < 1:
                raise ValueError("x must be positive")

    outer = dataclasses.make_dataclass("Outer", [("inner", Strict, Strict())], frozen=True)()
    for item in ("--inner.x=0", "--inner=Strict(x=0)"):
        with pytest.raises(ConfigError, match=r"^inner: x must be positive$"):
            configs.override(outer, [item])


def test_with():
    assert configs.with_(Tree(), "model.attention", Gqa(heads=2)).model.attention.heads == 2
    assert configs.with_(Tree(), "optimizer.betas.0", 0.5).optimizer.betas == (0.5, 0.95)
    with pytest.raises(ConfigError, match=r"^steps='4': expected int$"):
        configs.with_(Tree(), "steps", "4")
    with pytest.raises(ConfigError, match="unknown field step: did you mean steps"):
        configs.with_(Tree(), "step", 4)


def test_frozen():
    tree = configs.override(Tree(), ["--steps=3"])
    with pytest.raises(dataclasses.FrozenInstanceError):
        tree.steps = 4
    hash(tree)


# ---- validation ------------------------------------------------------------------------------------------------------


def test_validate_names_path_value_and_remedy():
    configs.validate(Tree())
    bad = configs.override(Tree(), ["--model.pattern.1.mixer.kv_heads=3"])
    with pytest.raises(ConfigError) as caught:
        configs.validate(bad)
    assert str(caught.value) == "model.pattern.1.mixer.kv_heads=3 does not divide heads=8: use 1, 2, 4 or 8"


def test_validate_checks_types_made_in_python():
    with pytest.raises(ConfigError, match=r"^model.attention.heads='4': expected int$"):
        configs.validate(Tree(model=Net(attention=Gqa(heads="4"))))
    with pytest.raises(ConfigError, match=r"^model.pattern=\[\]: expected tuple of Layer$"):
        configs.validate(Tree(model=Net(pattern=[])))
    with pytest.raises(ConfigError, match=r"^fast=1: expected bool$"):
        configs.validate(Tree(fast=1))
    with pytest.raises(ConfigError, match=r"^steps=True: expected int$"):
        configs.validate(Tree(steps=True))
    with pytest.raises(ConfigError, match=r"^model.attention=Layer\(.*\): expected Gqa \(Gqa, Latent\) or Ssm$"):
        configs.validate(Tree(model=Net(attention=Layer())))


def test_a_bool_is_no_number_of_a_literal():
    counted = dataclasses.make_dataclass("Counted", [("bits", Literal[1, 2], 1)], frozen=True)
    assert configs.override(counted(), ["--bits=2"]).bits == 2
    with pytest.raises(ConfigError, match=r"^bits=True: expected 1 or 2$"):
        configs.validate(counted(bits=True))


def test_validate_reports_all_problems_and_spares_parents_of_bad_children():
    @dataclasses.dataclass(frozen=True)
    class Pair:
        a: Gqa = Gqa(kv_heads=3)
        b: Gqa = Gqa(kv_heads=5)

        def problems(self) -> Iterator[tuple[str, str]]:
            yield "", "relies on sound children" if self.a.heads % self.a.kv_heads else "is wrong"

    with pytest.raises(ConfigError) as caught:
        configs.validate(Pair())
    assert sorted(part.split("=")[0] for part in str(caught.value).split("; ")) == ["a.kv_heads", "b.kv_heads"]
    with pytest.raises(ConfigError, match="is wrong"):
        configs.validate(Pair(Gqa(kv_heads=1), Gqa()))


def test_a_mutable_node_is_refused():
    @dataclasses.dataclass
    class Loose:
        x: int = 1

    outer = dataclasses.make_dataclass(
        "Outer", [("inner", Loose, dataclasses.field(default_factory=Loose))], frozen=True
    )
    with pytest.raises(ConfigError, match="inner: Loose must be a frozen dataclass"):
        configs.validate(outer())


def test_errors_are_one_line():
    assert str(InputError("a\nb")) == "a b"
    assert issubclass(ConfigError, InputError)
    assert issubclass(InputError, ValueError)


# ---- leaves, saving, comparing ---------------------------------------------------------------------------------------


def test_leaves():
    found = configs.leaves(Tree())
    assert found["model.pattern.0.mixer.rank"] == 16
    assert found["optimizer.betas"] == (0.9, 0.95)
    assert found["model.extra"] is None
    assert "model.pattern" not in found
    assert len(found) == 23
    for path, value in found.items():
        assert get(Tree(), path) == value


def test_round_trip_through_json():
    tree = configs.override(
        Tree(), ["--model.attention=Latent(rank=3)", "--optimizer.colour=BLUE", "--model.extra=Layer"]
    )
    data = json.loads(json.dumps(configs.to_dict(tree)))
    assert data["model"]["attention"]["_type"] == f"{__name__}:Latent"
    assert data["optimizer"]["betas"] == [0.9, 0.95]  # defaults are written
    back = configs.from_dict(data)
    assert back == tree
    assert configs.to_dict(back) == data
    assert hash(back) == hash(tree)


def damaged(path, change):
    data = configs.to_dict(Tree())
    node = data
    for part in path.split(".") if path else []:
        node = node[int(part)] if part.isdigit() else node[part]
    change(node)
    return data


@pytest.mark.parametrize(
    ("path", "change", "message"),
    [
        ("model", lambda d: d.update(num_layer=3), "unknown field model.num_layer of Net: did you mean num_layers?"),
        ("model", lambda d: d.pop("dtype"), "missing field model.dtype of Net: it was saved without it"),
        ("model", lambda d: d.update(num_layers="x"), "model.num_layers=x: expected int"),
        ("model.pattern.1.mixer", lambda d: d.update(heads=2.5), "model.pattern.1.mixer.heads=2.5: expected int"),
        (
            "model.attention",
            lambda d: d.update(_type=f"{__name__}:Sms"),
            f"model.attention: no config class {__name__}:Sms here: did you mean {__name__}:Ssm, {__name__}:Gqa?",
        ),
        ("", lambda d: d.pop("_type"), "config: no config class None here"),
        ("", lambda d: d.update(_type="llmjax.no.such:Thing"), "config: no config class llmjax.no.such:Thing here"),
        ("", lambda d: d.update(_type="subprocess:Popen"), "config: no config class subprocess:Popen here"),
        (
            "",
            lambda d: d.update(_type="llmjax.config:os.system"),
            "config: no config class llmjax.config:os.system here",
        ),
    ],
)
def test_damaged_files(path, change, message):
    with pytest.raises(ConfigError) as caught:
        configs.from_dict(damaged(path, change))
    assert str(caught.value) == message


def test_a_node_of_another_kind_is_refused():
    data = damaged("model", lambda d: d.update(attention=configs.to_dict(Layer())))
    with pytest.raises(ConfigError, match=r"^model.attention=Layer\(.*: expected Gqa"):
        configs.from_dict(data)


def test_no_module_is_imported_because_a_file_names_it(tmp_path, monkeypatch):
    (tmp_path / "evil_module.py").write_text(
        "from dataclasses import dataclass\nopen('HACKED', 'w')\n@dataclass(frozen=True)\nclass Evil:\n    x: int = 1\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for kind in ("evil_module:Evil", "llmjax.__main__:Evil", "this:Evil"):
        with pytest.raises(ConfigError):
            configs.from_dict({"_type": kind, "x": 1})
    assert "evil_module" not in sys.modules
    assert "llmjax.__main__" not in sys.modules
    assert not (tmp_path / "HACKED").exists()


def test_diff():
    assert configs.diff(Tree(), Tree()) == []
    changed = configs.override(Tree(), ["--steps=5", "--model.attention=Gqa", "--model.pattern=(Layer(),)"])
    assert configs.diff(Tree(), changed) == [
        ("model.pattern", Tree().model.pattern, (Layer(),)),
        ("model.attention", Ssm(), Gqa()),
        ("steps", 100, 5),
    ]
    nan = configs.override(Tree(), ["--optimizer.learning_rate=nan"])
    assert configs.diff(nan, configs.override(Tree(), ["--optimizer.learning_rate=nan"])) == []
    assert [path for path, _, _ in configs.diff(nan, Tree())] == ["optimizer.learning_rate"]


# ---- classes ---------------------------------------------------------------------------------------------------------


def test_subclasses_are_the_concrete_ones():
    assert configs.subclasses(Mix) == {"Gqa": Gqa, "Latent": Latent, "Ssm": Ssm}
    assert configs.subclasses(Gqa) == {"Gqa": Gqa, "Latent": Latent}
    assert configs.subclasses(Layer) == {"Layer": Layer}


def test_adding_a_file_is_enough(tmp_path, monkeypatch):
    room = tmp_path / "house_of_tests" / "room"
    (room / "deep").mkdir(parents=True)
    for folder in (room.parent, room, room / "deep"):
        (folder / "__init__.py").write_text("")
    head = "from dataclasses import dataclass\n"
    (room / "base.py").write_text(f"{head}@dataclass(frozen=True)\nclass Base:\n    pass\n")
    for file, name in (("one.py", "One"), ("deep/two.py", "Two")):
        text = (
            f"from house_of_tests.room.base import Base\n@dataclass(frozen=True)\nclass {name}(Base):\n    x: int = 1\n"
        )
        (room / file).write_text(head + text)
    (room.parent / "elsewhere.py").write_text("raise RuntimeError('another room was imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    from house_of_tests.room.base import Base

    assert list(configs.subclasses(Base)) == ["One", "Two"]


def test_docs():
    assert configs.docs(Gqa) == {"heads": "query heads", "kv_heads": "key heads; None for as many"}
    assert configs.docs(Latent)["heads"] == "query heads"


# ---- costs -----------------------------------------------------------------------------------------------------------


def test_reading_takes_under_50_ms():
    items = ["--model.pattern=(Layer(mixer=Gqa(heads=2)), Layer())", *[f"--steps={i}" for i in range(20)]]

    def seconds():
        start = time.perf_counter()
        configs.validate(configs.override(Tree(), items))
        return time.perf_counter() - start

    assert min(seconds() for _ in range(5)) < 0.05


def test_import_is_light():
    code = "import sys, llmjax.config; print([m for m in ('jax', 'flax', 'numpy', 'optax') if m in sys.modules])"
    root = Path(configs.__file__).parent.parent
    command = [sys.executable, "-c", code]
    result = subprocess.run(
        command, capture_output=True, text=True, check=True, env=os.environ | {"PYTHONPATH": str(root)}
    )
    assert result.stdout.strip() == "[]"
