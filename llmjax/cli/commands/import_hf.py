"""`llmjax import PATH RUN_DIR`: a run directory of a Hugging Face model folder."""

import shutil
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from llmjax.cli.text import short
from llmjax.config import InputError, override, validate
from llmjax.data import Data, TokenizerJson
from llmjax.experiment import Experiment, save
from llmjax.models.hf import CONFIG, Folder, copy_companions, open_hf, read_json
from llmjax.models.pretrained import folder_of
from llmjax.nn.model import Params, split
from llmjax.train import checkpoint
from llmjax.train.loop import Progress
from llmjax.train.process import use_compilation_cache
from llmjax.train.state import State, plan

PRETRAINED = "pretrained"
"""folder of a run directory that holds what came with the model"""


def run(arguments: Namespace) -> dict[str, Any]:
    """Make the run directory; returns family, parameters and the directory."""
    run_dir = Path(arguments.run_dir)
    if (run_dir / CONFIG).exists():
        raise InputError(f"{run_dir} holds a run already: give another directory")
    folder = open_hf(folder_of(arguments.path))
    experiment = experiment_of(folder, run_dir, arguments.overrides)
    use_compilation_cache()
    with experiment.mesh.in_force():
        target = plan(experiment.model, experiment.optimizer, experiment.train, experiment.mesh.build())
    params = folder.params(target.abstract.model_params)
    copy_companions(folder.path, run_dir / PRETRAINED)
    shutil.copyfile(folder.path / CONFIG, run_dir / PRETRAINED / CONFIG)
    save(experiment, run_dir, arguments.argv)
    write(run_dir, *split(params, experiment.model.trains))
    count = experiment.model.num_params()
    print(f"{run_dir}: {folder.family.model_type}, {short(count)} parameters")
    return {"model_type": folder.family.model_type, "params": count, "run_dir": arguments.run_dir}


def experiment_of(folder: Folder, run_dir: Path, overrides: Sequence[str]) -> Experiment:
    """The folder's model and tokenizer in an experiment, which `overrides` may change; raises ConfigError."""
    data, tokenizer = Data(), folder.path / "tokenizer.json"
    if tokenizer.exists():
        place = run_dir.resolve() / PRETRAINED / tokenizer.name
        data = replace(data, tokenizer=TokenizerJson(path=str(place), **special_tokens(folder.path)))
    elif not any(word.startswith("--data") for word in overrides):
        raise InputError(f"{folder.path} has no tokenizer.json: give --data.tokenizer, or other --data")
    positions = getattr(getattr(folder.config, "positions", None), "length", data.length)
    data = replace(data, length=min(data.length, positions))
    experiment = override(Experiment(name=run_dir.name, model=folder.config, data=data), overrides)
    validate(experiment)
    return experiment


def special_tokens(folder: Path) -> dict[str, str]:
    """The tokens that begin and end a document, where the tokenizer's config names them."""
    path = folder / "tokenizer_config.json"
    given = read_json(path) if path.exists() else {}
    found = {"bos": given.get("bos_token"), "eos": given.get("eos_token")}
    texts = {name: token.get("content") if isinstance(token, dict) else token for name, token in found.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def write(run_dir: Path, params: Params, frozen: Params) -> None:
    """Write the parameters as the checkpoint of step 0: nothing is known of an optimizer, or of data."""
    state = State(params, opt_state=(), ema=None, loss_scale=None, bad=jnp.zeros((), jnp.int32), frozen=frozen)
    writer = checkpoint.Writer(run_dir, keep_last=1, keep_best=0)
    try:
        writer.save(0, state, asdict(Progress()), None)
    finally:
        writer.close()
