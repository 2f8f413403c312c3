"""The tutorial's commands: each is understood, its experiment and overrides load, its launches can be shown."""

import re
import shlex
from pathlib import Path

import pytest

from llmjax.cli import read
from llmjax.cli.verbs import VERBS
from llmjax.experiment import load_experiment
from llmjax.launch.machines import check_mesh, machines

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "from_laptop_to_pod.md").read_text()
BLOCKS = "\n".join(re.findall(r"^```\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)).replace("\\\n", " ")


def commands() -> list[list[str]]:
    """The words of every llmjax command of the page, in blocks and in sentences, without variables set before it."""
    lines = BLOCKS.splitlines() + re.findall(r"`(llmjax \w+ [^`]+)`", PAGE)
    found = [shlex.split(line, comments=True) for line in lines]
    found = [words[[*words, "llmjax"].index("llmjax") :] for words in found]
    return [words for words in found if words]


COMMANDS = commands()


def test_the_page_has_commands_of_each_place():
    assert {words[1] for words in COMMANDS} >= {"show", "train", "generate", "plan", "launch", "plot"}
    places = {word for words in COMMANDS for word in words if word.startswith("--on=")}
    assert places == {"--on=box", "--on=tpu-pod", "--on=gke", "--on=slurm"}


@pytest.mark.parametrize("words", [w for w in COMMANDS if w[1] != "launch" or len(w) > 2], ids=shlex.join)
def test_every_command_is_understood(words, monkeypatch):
    """Its verb, arguments and overrides; a plan's mesh fits its target."""
    monkeypatch.chdir(ROOT)
    arguments = read(VERBS[words[1]], words[2:])
    file = getattr(arguments, "experiment", "").partition(":")[0]
    if file.endswith(".py"):
        experiment = load_experiment(arguments.experiment, arguments.overrides)
        if words[1] == "plan":
            check_mesh(experiment.mesh, machines(arguments.target).devices, "target")


LAUNCHES = [words for words in COMMANDS if words[1] == "launch"]


@pytest.mark.parametrize("words", LAUNCHES, ids=shlex.join)
def test_every_launch_can_be_shown(words, checkout):
    assert "--dry-run" in words
    done = checkout.launch(*words[2:])
    assert (done.code, done.err) == (0, "")
    assert re.search(r"^\$ ", done.out, re.MULTILINE)
    assert checkout.calls() == []


def test_files_that_the_page_names_are_there():
    names = re.findall(r"\]\((\S+?)\)", PAGE) + [f"../{name}" for name in re.findall(r"`(scripts/[\w/.]+)`", PAGE)]
    assert names
    assert not [name for name in names if not (ROOT / "docs" / name).exists()]
