"""`llmjax plan` for chips that are not there: the real compilers, what they refuse, the recipes of experiments/pods."""

import ast
import json
import re
from pathlib import Path

import pytest

from llmjax.cli import main

ROOT = Path(__file__).resolve().parents[2]
PODS = ROOT / "experiments" / "pods"
TINY = str(ROOT / "experiments" / "tiny.py")


def plan(capsys, *words):
    assert main(["plan", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.parametrize("target", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1", "h200:1x1x4"])
def test_a_small_step_for_every_chip(target, capsys):
    """Each compiler's text is understood: no loop of unknown length, the products within 25 % of the model's own FLOPs.

    Kernels compute whole blocks of the causal mask, and GPUs multiply by tiles: more than the model needs, never less.
    """
    mesh = ["--mesh.fsdp=4", "--data.batch_size=4", "--model.unroll=1", "--model.d_model=256", "--chip-hour=2.5"]
    found = plan(capsys, TINY, f"--target={target}", *mesh)
    assert found["fits"]
    assert found["devices"] == 4
    assert found["loops_counted_once"] == 0
    assert {row["axis"] for row in found["collectives"]} == {"fsdp"}
    share = found["executed_flops"] * 4 / found["model_flops_per_step"]
    assert 0.95 < share < 1.6
    assert 0 < found["mfu"] < 1
    assert found["step_seconds"] == pytest.approx(
        sum(found["terms"][name] for name in ("matmul", "kernels", "hbm", "exposed"))
    )
    steps = found["total_tokens"] / found["tokens_per_step"]
    assert found["run"]["price"] == pytest.approx(2.5 * 4 * steps * found["step_seconds"] / 3600)


@pytest.mark.parametrize("target", ["v5p:2x2x1", "h200:1x1x4"])
def test_decoding_is_planned(target, capsys):
    """Tokens a second stay below what weights and cache read once allow, and within a factor of 20 of it.

    The embedding's table, of which decoding reads some rows, is 2 % of these weights. The cache is that of two layers,
    keys and values, float32, its rows split.
    """
    sizes = [
        "--model.layers=2",
        "--model.unroll=1",
        "--model.d_model=256",
        "--data.length=1024",
        "--data.batch_size=64",
    ]
    found = plan(capsys, TINY, f"--target={target}", "--step=decode", "--mesh.data=4", *sizes)
    assert found["fits"]
    assert found["tokens_per_step"] == 64
    keys_and_values = 2 * 2 * 64 * 1024 * 256 * 4
    assert found["memory"]["cache"] == pytest.approx(keys_and_values / 4, rel=0.01)
    assert 0.05 < 64 / found["step_seconds"] / found["bound"]["tokens_per_second"] < 1.02
    assert found["loops_counted_once"] == 0


@pytest.mark.long
def test_attention_kept_is_attention_computed_once(capsys):
    """Causal attention's forward pass is 2 products of a head's blocks, its backward pass 5: 7 in all where 9 were.

    2 %: what a kernel says of blocks that it computes in part.
    """
    sizes = ["--mesh.fsdp=4", "--data.batch_size=4", "--data.length=4096", "--model.unroll=1", "--model.d_model=512"]
    full, kept = (
        plan(capsys, TINY, "--target=v5p:2x2x1", *sizes, f"--model.remat={remat}") for remat in ("full", "attention")
    )
    assert kept["terms"]["kernels"] / full["terms"]["kernels"] == pytest.approx(7 / 9, rel=0.02)
    assert full["memory"]["temporaries"] < kept["memory"]["temporaries"]


def test_out_of_memory_is_an_answer(capsys):
    """8B parameters on four chips of 16 GB: does not fit, by how much, and what to change; exit code 0."""
    found = plan(capsys, str(PODS / "llama3_8b.py"), "--target=v5e:2x2", "--mesh.data=1", "--mesh.fsdp=4")
    assert not found["fits"]
    assert found["hbm_bytes_per_chip"] > found["hbm_limit_bytes"] == int(15.75 * 2**30)
    assert found["memory"]["parameters"] + found["memory"]["optimizer_state"] > found["hbm_limit_bytes"]
    assert any("--mesh.fsdp=8" in line for line in found["advice"])


@pytest.mark.parametrize(("text", "near"), [("v5p:3x3x3", "v5p:2x4x4"), ("v6e:15x15", "v6e:16x16")])
def test_an_unknown_slice_names_the_nearest(text, near, capsys):
    assert main(["plan", TINY, f"--target={text}"]) == 2
    error = capsys.readouterr().err
    assert near in error
    assert len(error.splitlines()) == 1


PLAN = re.compile(
    r"([\w.]+\.py\S*) --target=(\S+)\n.*?([\d.]+) GiB of .*?([\d.]+) s a step.*?MFU ([\d.]+) %", re.DOTALL
)
"""How a recipe's docstring records a plan: the command, then memory, time and MFU."""


def recorded():
    for path in sorted(PODS.glob("*.py")):
        for file, target, *numbers in PLAN.findall(ast.get_docstring(ast.parse(path.read_text()))):
            yield pytest.param(file, target, *map(float, numbers), id=f"{file}-{target}")


@pytest.mark.long
@pytest.mark.parametrize(("file", "target", "gib", "seconds", "mfu"), list(recorded()))
def test_recipes_take_what_their_files_say(file, target, gib, seconds, mfu, capsys):
    """Memory, time and MFU of every plan that a recipe records: 3 %, for other versions of the compiler."""
    found = plan(capsys, str(PODS / file), f"--target={target}")
    assert found["fits"]
    assert found["hbm_bytes_per_chip"] / 2**30 == pytest.approx(gib, rel=0.03)
    assert found["step_seconds"] == pytest.approx(seconds, rel=0.03)
    assert 100 * found["mfu"] == pytest.approx(mfu, rel=0.03)


@pytest.mark.long
@pytest.mark.parametrize(("recipe", "memory"), [("llama3_8b.py", 80e9), ("llama3_8b.py:qlora", 24e9)])
def test_eight_billion_parameters_are_tuned_on_one_gpu(recipe, memory, capsys):
    """LoRA on a bfloat16 base fits 80 GB, QLoRA 24 GB; the adapters' gradients and moments are 12 bytes a parameter."""
    found = plan(capsys, str(ROOT / "experiments" / "finetune" / recipe), "--target=h200:1x1x1")
    assert found["fits"]
    assert found["hbm_bytes_per_chip"] < memory
    assert found["memory"]["parameters"] == 4 * 41_943_040
    assert found["memory"]["optimizer_state"] == pytest.approx(8 * 41_943_040, abs=64)
    weights = 8_030_261_248
    bits = {"llama3_8b.py": 16, "llama3_8b.py:qlora": 4.127}[recipe]
    tables = 2 * 128256 * 4096
    expected = (weights - tables) * bits / 8 + 2 * tables
    assert found["memory"]["frozen"] == pytest.approx(expected, rel=1e-3)
