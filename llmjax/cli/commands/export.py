"""`llmjax export RUN_DIR PATH`: a run's model as a Hugging Face folder, its adapters as those of peft."""

from argparse import Namespace
from pathlib import Path
from typing import Any

from llmjax.adapters import Adapted
from llmjax.adapters.merge import merge
from llmjax.adapters.peft import formats as peft_formats
from llmjax.adapters.peft import save_peft
from llmjax.adapters.peft.modules import innermost
from llmjax.cli.commands.import_hf import PRETRAINED
from llmjax.cli.runs import choose
from llmjax.config import InputError
from llmjax.data.library_codec import LibraryCodec
from llmjax.experiment import Experiment, load
from llmjax.models.families import FAMILIES
from llmjax.models.hf import CONFIG, read_json, save_hf
from llmjax.models.mapping import Family
from llmjax.models.pretrained import FromPretrained, folder_of
from llmjax.nn.model import Model, Params, Wrapped, flat, unflat
from llmjax.nn.stored import Stored
from llmjax.parallel.mesh import MeshConfig
from llmjax.train.load import params_of


def run(arguments: Namespace) -> dict[str, Any]:
    """Write the folder; returns its path and the step of the parameters."""
    target, run_dir = Path(arguments.path), Path(arguments.run_dir)
    for file in (CONFIG, peft_formats.CONFIG):
        if (target / file).exists():
            raise InputError(f"{target} holds a model already: give another folder")
    experiment = load(run_dir)
    found = choose(run_dir, arguments.checkpoint)
    params = params_of(experiment, found, MeshConfig())
    model = experiment.model
    if isinstance(model, Adapted) and model.adapters and not arguments.merge:
        for adapter in model.adapters:
            place = target if len(model.adapters) == 1 else target / adapter.name
            save_peft(place, model, params, adapter.name, getattr(model.base, "path", None))
        print(f"{target}: the adapters of step {found.step}; --merge writes the model with them in it")
    else:
        export(experiment, plain(model, params, arguments.merge), run_dir, target, arguments)
        print(f"{target}: the parameters of step {found.step} as {arguments.dtype}")
    return {"path": arguments.path, "step": found.step}


def plain(model: Model, params: Params, merging: bool) -> Params:
    """The parameters of the innermost model, adapters merged and quantised matrices dense where that is wanted."""
    if isinstance(model, Adapted):
        params, _ = merge(model, params, dequantise=merging)
    if merging:
        return unflat({path: x.dense() if isinstance(x, Stored) else x for path, x in flat(params).items()})
    return params


def export(experiment: Experiment, params: Params, run_dir: Path, target: Path, arguments: Namespace) -> None:
    """Write the whole model, and what came with it."""
    model = innermost(experiment.model)
    inside = experiment.model
    while isinstance(inside, Wrapped) and not isinstance(inside, FromPretrained):
        inside = inside.base
    source = folder_of(inside.path) if isinstance(inside, FromPretrained) else run_dir / PRETRAINED
    theirs = read_json(source / CONFIG) if (source / CONFIG).exists() else {}
    family = origin(theirs, model)
    extra = {key: theirs[key] for key in (family.extra if family else ()) if key in theirs}
    save_hf(
        target,
        model,
        params,
        extra,
        family=family,
        dtype=arguments.dtype,
        companions=source if source.exists() else None,
        shard_bytes=round(arguments.max_shard_gb * 1e9),
    )
    if not source.exists():
        codec = experiment.data.build(experiment.seed).tokenizer
        if isinstance(codec, LibraryCodec):
            (target / "tokenizer.json").write_text(codec.tokenizer_json(), encoding="utf-8")


def origin(theirs: dict[str, Any], model: Any) -> Family | None:
    """The family that the model came from, if it can still express it."""
    family = FAMILIES.get(theirs.get("model_type", ""))
    try:
        return family if family and family.to_hf_config(model) else None
    except InputError:
        return None
