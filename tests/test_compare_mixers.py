"""The comparison of mixers at a scale of seconds: what it writes, what it merges, and what it refuses."""

import json

import pytest

from llmjax.fields import subclasses
from llmjax.nn.masks import AttentionMask
from llmjax.nn.mixer import Mixer
from scripts import compare_mixers
from scripts.mixers_page import verdicts

pytestmark = pytest.mark.mixers

MIXER = "ChannelMixing"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the cheapest mixer to compile and one way to place tokens were tried, one call after the other."""
    path = tmp_path_factory.mktemp("mixers")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLMJAX_CACHE", str(path / "cache"))
        patch.setattr(compare_mixers, "TASKS", {name: compare_mixers.TASKS[name] for name in ("recall", "induction")})
        compare_mixers.measure(path, ["ChannelMixing"], compare_mixers.QUICK, pooled=False)
        compare_mixers.measure(path, ["ALiBi"], compare_mixers.QUICK, pooled=False)
    return path


def test_every_mixer_and_mask_is_compared_or_left_out_with_a_reason():
    """Found by type: each name of each kind is there once."""
    found, left_out = compare_mixers.mixers()
    names = {*subclasses(Mixer), *(f"Attention, {name}" for name in subclasses(AttentionMask))}
    assert names - {"Attention, Full"} <= found.keys() | left_out.keys()
    assert not found.keys() & left_out.keys()
    for layers in found.values():
        assert not list(compare_mixers.model_of(*layers).problems())


def test_runs_are_merged(folder):
    """The second call keeps the first one's numbers; each record says where and when."""
    results = json.loads((folder / "mixers.json").read_text())
    assert (set(results["mixers"]), set(results["sizes"]), set(results["positions"])) == ({MIXER}, set(), {"ALiBi"})
    record = results["mixers"][MIXER]
    assert record["environment"].keys() >= {"date", "cores", "jax", "python"}
    assert set(record["tasks"]) == {"recall", "induction"}
    assert all(0 <= task["accuracy"] <= 1 for task in record["tasks"].values())
    assert [*results["positions"]["ALiBi"]["tested"]] == ["16", "32"]


def test_costs_are_those_of_the_definition(folder):
    """Channel mixing keeps a token: 2 layers x 64 float32, at every length; 6 FLOPs a weight, 3 x 6 a mix."""
    record = json.loads((folder / "mixers.json").read_text())["mixers"][MIXER]
    assert record["state_bytes"] == {"16": 2 * 64 * 4, "32": 2 * 64 * 4}
    weights = 2 * (64 * 64 + 2 * 64 * 256)
    assert record["flops_per_token"]["16"] == 6 * (weights + 64 * 257) + 3 * 2 * (2 * 3 * 64)
    assert all(speed > 0 for speed in record["tokens_per_second"].values())


def test_the_page_holds_what_was_measured(folder):
    """Its tables have a row a run; the picture is a PNG."""
    text = (folder / "mixers.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith((f"| {MIXER} |", "| ALiBi |"))]
    assert len(rows) == 3
    record = json.loads((folder / "mixers.json").read_text())["mixers"][MIXER]
    assert f"| {MIXER} | fixed | {record['tasks']['recall']['accuracy']:.2f} |" in text
    assert record["environment"]["date"] in text
    assert (folder / "mixers.png").read_bytes().startswith(b"\x89PNG")


def test_claims_stand_or_fall_by_the_numbers():
    """The same claims with numbers on either side of what they need."""

    def made(recall, small, learned):
        mixer = {"tasks": {"recall": {"accuracy": recall}}}
        sizes = {"a": {"state_bytes": 1, "accuracy": small}, "b": {"state_bytes": 2, "accuracy": 0.9}}
        far = {"ALiBi": {"tested": {"1": 2.5, "2": 2.4}}, "learned": {"tested": {"1": 2.5, "2": learned}}}
        return {"mixers": {"Attention": mixer}, "sizes": sizes, "positions": far}

    assert all("not come out" not in line for line in verdicts(made(0.95, 0.2, 4.0)))
    assert all("**did not come out**" in line for line in verdicts(made(0.5, 0.8, 2.6)))


def test_an_unknown_name_is_refused():
    with pytest.raises(SystemExit, match="unknown: Mambo; there is"):
        compare_mixers.wanted({"mixers": {"Mamba": ()}}, ["Mambo"])
