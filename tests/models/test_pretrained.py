"""A model folder as a run directory and back, and as the model of an experiment."""

import json
import shutil

import chex
import flax.linen as nn
import jax
import numpy as np
import pytest
from flax.core import meta
from safetensors.numpy import load_file
from tokenizers import Tokenizer, models, pre_tokenizers

from llmjax.cli import main
from llmjax.config import InputError, from_dict, to_dict, validate, with_
from llmjax.experiment import Experiment, load
from llmjax.models import pretrained
from llmjax.models.hf import load_hf
from llmjax.models.pretrained import FromPretrained
from llmjax.parallel.mesh import MeshConfig, shardings
from tests.models.golden import FOLDER, logits

TEXTS = f"InMemory(texts={tuple(f'w{i} w{i + 1} w3 w4 w5 w6' for i in range(12))}, holdout=0.5)"
DATA = [f"--data.source={TEXTS}", "--data.length=8", "--data.batch_size=2"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The golden LLaMA with a tokenizer of 53 words."""
    monkeypatch.setenv("LLMJAX_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "hub"
    shutil.copytree(FOLDER / "llama", path)
    words = ["<s>", "</s>", "<unk>", *(f"w{i}" for i in range(50))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text('{"bos_token": {"content": "<s>"}, "eos_token": "</s>"}')
    (path / "generation_config.json").write_text('{"max_new_tokens": 7}')
    (path / "chat_template.jinja").write_text("{{ messages }}")
    theirs = json.loads((path / "config.json").read_text()) | {"eos_token_id": 1, "max_position_embeddings": 99}
    (path / "config.json").write_text(json.dumps(theirs))
    return path


@pytest.mark.adapters
def test_import_generate_and_export(folder, tmp_path, capsys):
    run, out = str(tmp_path / "run"), tmp_path / "out"
    assert main(["import", str(folder), run, *DATA]) == 0
    assert load(run).model == load_hf(folder)[0]
    shutil.move(folder, tmp_path / "gone")
    capsys.readouterr()

    assert (
        main(["generate", run, "--prompt=w1 w2", "--generate.max_tokens=4", "--generate.temperature=0", "--json"]) == 0
    )
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    tokens, (config, params) = [0, 4, 5], load_hf(tmp_path / "gone")
    for token in found["tokens"]:
        padded = np.array([tokens + [0] * (8 - len(tokens))])
        assert int(logits(config, params, padded)[0, len(tokens) - 1].argmax()) == token
        tokens.append(token)
    assert found["step"] == 0

    assert main(["export", run, str(out)]) == 0
    original, written = (load_file(path / "model.safetensors") for path in (tmp_path / "gone", out))
    chex.assert_trees_all_equal(written, original)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        assert (out / name).read_bytes() == (tmp_path / "gone" / name).read_bytes()
    theirs = json.loads((out / "config.json").read_text())
    assert (theirs["eos_token_id"], theirs["max_position_embeddings"]) == (1, 99)

    assert main(["import", str(out), run, *DATA]) == 2
    assert "holds a run already" in capsys.readouterr().err
    assert main(["export", run, str(out)]) == 2
    assert "holds a model already" in capsys.readouterr().err


def test_a_folder_without_tokenizer_asks_for_one(folder, tmp_path, capsys):
    (folder / "tokenizer.json").unlink()
    assert main(["import", str(folder), str(tmp_path / "run")]) == 2
    assert "has no tokenizer.json: give --data.tokenizer" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_model_from_a_folder_stands_in_an_experiment(folder):
    model = with_(with_(FromPretrained(str(folder)), "base.remat", "full"), "base.pattern.0.dropout", 0.25)
    config, params = load_hf(folder)
    assert (model.vocab, model.remat, model.base.pattern[0].dropout) == (config.vocab, "full", 0.25)
    assert (model.num_params(), model.flops_per_token(8)) == (config.num_params(), config.flops_per_token(8))
    experiment = Experiment(model=model)
    again = from_dict(json.loads(json.dumps(to_dict(experiment))))
    assert again.model == model
    validate(experiment.model)
    boxed = model.boxed()
    shapes, mesh = meta.unbox(boxed), MeshConfig().build()
    where = shardings(nn.get_partition_spec(boxed), shapes, mesh)
    placed = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, where)
    loaded = model.loaded(placed)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(loaded))
    chex.assert_trees_all_equal(jax.tree.map(np.asarray, loaded), params)
    chex.assert_trees_all_equal(model.init(jax.random.key(0)), params)


def test_bad_paths_and_other_models_get_one_line(folder, tmp_path):
    for path in ("", str(tmp_path / "nowhere"), "no id at all"):
        with pytest.raises(InputError, match="there is no such folder: name one with"):
            FromPretrained(path)
    with pytest.raises(InputError, match=r"holds another model: layers is 2 there and 3 in the config"):
        with_(FromPretrained(str(folder)), "base.layers", 3).init(jax.random.key(0))


def test_hub_ids_go_through_the_library(folder, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    asked = []

    def download(name, allow_patterns):
        asked.append((name, allow_patterns))
        return str(folder)

    monkeypatch.setattr(hub, "snapshot_download", download)
    assert FromPretrained("owner/name").base == load_hf(folder)[0]
    assert asked[0][0] == "owner/name"
    assert not any("bin" in pattern or "*.pt" in pattern for pattern in asked[0][1])
    monkeypatch.setattr(hub, "snapshot_download", lambda name, allow_patterns: (_ for _ in ()).throw(OSError("off")))
    with pytest.raises(InputError, match="neither a folder here nor to be had from the hub: off"):
        pretrained.folder_of("owner/name")
