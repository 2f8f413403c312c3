"""The families that continue no text, against transformers, live: outputs, tensors there and back, the export.

T5, BERT, ViT and CLIP; those that generate as a decoder does are in test_families.py.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file

from llmjax.models import bamba, bert, clip, mamba, mamba2, recurrent_gemma, rwkv, t5, vit
from llmjax.models.families import FAMILIES
from llmjax.models.hf import load_hf, save_hf
from llmjax.models.mapping import import_weights, shapes
from llmjax.nn.encoder import MaskedHead
from llmjax.objectives.contrastive import contrastive_loss
from tests.evidence import evidence
from tests.models.golden import TOLERANCE, relative_error

pytestmark = pytest.mark.parity

VOCAB, STEPS = 61, 32
RANDOM = np.random.default_rng(1)
SOURCE, TARGET = (RANDOM.integers(3, VOCAB, shape) for shape in ((3, 17), (3, 9)))
THERE = np.arange(17) < np.array([[17], [12], [5]])
POSITIONS = jnp.asarray(np.where(THERE, np.arange(17), -1), jnp.int32)
TYPES = RANDOM.integers(0, 2, SOURCE.shape)
IMAGES = RANDOM.normal(size=(3, 12, 12, 3)).astype(np.float32)
SIZES = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40}
BERT = SIZES | {"vocab_size": VOCAB, "max_position_embeddings": 32}
T5 = {"vocab_size": VOCAB, "d_model": 24, "d_kv": 10, "d_ff": 40, "num_layers": 2, "num_heads": 3}
T5 |= {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 12, "decoder_start_token_id": 0}
T5 |= {"eos_token_id": None}
IMAGE = SIZES | {"image_size": 12, "patch_size": 4}
TEXT = SIZES | {"hidden_size": 16, "vocab_size": VOCAB, "max_position_embeddings": 17}
OF_BERT = "D10 models.bert, A42 nn.encoder"
OF_T5 = "D11 models.t5, A43 nn.encoder_decoder, A05 nn.cross_attention"
OF_VIT = "D16 models.vit, A45 nn.vit"
OF_CLIP = "D16 models.clip, A46 nn.clip"
CASES = {
    "bert pretraining": ("BertForPreTraining", transformers.BertConfig, BERT, OF_BERT),
    "bert masked": (
        "BertForMaskedLM",
        transformers.BertConfig,
        BERT | {"hidden_act": "relu"},
        OF_BERT,
    ),
    "bert next sentence": (
        "BertForNextSentencePrediction",
        transformers.BertConfig,
        BERT,
        OF_BERT,
    ),
    "bert": ("BertModel", transformers.BertConfig, BERT | {"type_vocab_size": 3}, OF_BERT),
    "t5": (
        "T5ForConditionalGeneration",
        transformers.T5Config,
        T5,
        OF_T5,
    ),
    "t5 1.1": (
        "T5ForConditionalGeneration",
        transformers.T5Config,
        T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "num_decoder_layers": 3},
        OF_T5,
    ),
    "vit": (
        "ViTForImageClassification",
        transformers.ViTConfig,
        IMAGE | {"num_labels": 5},
        OF_VIT,
    ),
    "vit without biases": (
        "ViTModel",
        transformers.ViTConfig,
        IMAGE | {"qkv_bias": False},
        OF_VIT,
    ),
    "clip": (
        "CLIPModel",
        transformers.CLIPConfig,
        {"text_config": TEXT | {"eos_token_id": 7}, "vision_config": IMAGE, "projection_dim": 10},
        OF_CLIP,
    ),
    "clip of old": (
        "CLIPModel",
        transformers.CLIPConfig,
        {"text_config": TEXT | {"eos_token_id": 2}, "vision_config": IMAGE, "projection_dim": 10},
        OF_CLIP,
    ),
}
"""name: class of model and of config, the config's fields, catalogue rows and what of ours they are in"""


@pytest.fixture(autouse=True)
def one_thread():
    """Sums in one order: the machine's cores are shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def randomised(model):
    """The model with random parameters, large enough that all of them matter."""
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
            elif "logit_scale" not in name:
                parameter.copy_(torch.randn_like(parameter) * 1.5 / parameter.shape[-1] ** 0.5)
    return model.eval()


def texts(end):
    """Tokens that end by `end`, then padding of token 0."""
    found = np.where(end == SOURCE, 3, SOURCE)
    for row, there in zip(found, THERE, strict=True):
        row[there.sum() - 1 :] = [end, *[0] * (len(row) - there.sum())]
    return found


def their_outputs(model, config):
    """Every output that both have, by name."""
    pixels = torch.from_numpy(IMAGES).permute(0, 3, 1, 2)
    tokens, mask = torch.from_numpy(SOURCE), torch.from_numpy(THERE.astype(int))
    with torch.no_grad():
        match model.config.model_type:
            case "bert":
                out = model(input_ids=tokens, attention_mask=mask, token_type_ids=torch.from_numpy(TYPES))
                nsp = "NextSentence" in type(model).__name__
                names = {"last_hidden_state": "states", "pooler_output": "pooled", "prediction_logits": "masked"}
                names |= {"seq_relationship_logits": "rows", "logits": "rows" if nsp else "masked"}
            case "t5":
                out = model(input_ids=tokens, attention_mask=mask, decoder_input_ids=torch.from_numpy(TARGET))
                names = {"logits": "logits", "encoder_last_hidden_state": "states"}
            case "vit":
                out, names = model(pixels), {"logits": "logits", "last_hidden_state": "hidden"}
            case "clip":
                tokens = torch.from_numpy(texts(config.end_token))
                out = model(input_ids=tokens, pixel_values=pixels, return_loss=True)
                names = {"image_embeds": "images", "text_embeds": "texts", "logits_per_image": "logits", "loss": "loss"}
    found = {ours: out[theirs].numpy() for theirs, ours in names.items() if out.get(theirs) is not None}
    return {name: x[THERE] if name in ("states", "masked") else x for name, x in found.items()}


def our_outputs(config, params):
    """The same of our model."""

    def run(params, *inputs, method="__call__", **named):
        return config.build().apply({"params": params}, *inputs, method=method, **named)

    run = jax.jit(run, static_argnames=("method", "deterministic"))
    if hasattr(config, "text"):
        joint, _ = run(params, texts(config.end_token), IMAGES, method="features")
        logits = joint.scale * joint.images @ joint.texts.T
        return {"images": joint.images, "texts": joint.texts, "logits": logits, "loss": contrastive_loss(logits)}
    if hasattr(config, "side"):
        found, _ = run(params, IMAGES, method="features")
        return {"hidden": found.hidden, "logits": found.logits}
    if hasattr(config, "shared"):
        memory = run(params, SOURCE, POSITIONS, method="encode")
        return {"logits": run(params, TARGET, memory=memory)[0], "states": memory.states[THERE]}
    found = run(params, SOURCE, POSITIONS, token_types=TYPES, method="encode")
    masked = found.features.hidden @ found.features.kernel
    return {"states": found.states[THERE], "pooled": found.pooled, "masked": masked[THERE], "rows": found.row_logits}


def compare(theirs, ours, evidence):
    assert theirs
    assert theirs.keys() <= ours.keys()
    for name, expected in theirs.items():
        evidence.record(relative_error(ours[name], expected), TOLERANCE)


def marks(name, kind, rows):
    oracle = f"transformers {kind}: {name}, outputs and exported tensors"
    pairs = [pair.split() for pair in rows.split(", ")]
    return [evidence(row, oracle=oracle, code=f"llmjax.{module}") for row, module in pairs]


@pytest.mark.parametrize(
    ("kind", "make", "fields"),
    [pytest.param(*case, id=name, marks=marks(name, case[0], row)) for name, (*case, row) in CASES.items()],
)
def test_family(kind, make, fields, tmp_path, evidence):
    theirs = randomised(getattr(transformers, kind)._from_config(make(**fields), attn_implementation="eager"))
    theirs.save_pretrained(tmp_path / "theirs")
    config, params = load_hf(tmp_path / "theirs")
    expected = their_outputs(theirs, config)
    compare(expected, our_outputs(config, params), evidence)

    family = FAMILIES[theirs.config.model_type]
    save_hf(tmp_path / "ours", config, params, family=family)
    original, written = (load_file(tmp_path / side / "model.safetensors") for side in ("theirs", "ours"))
    original = {name: x for name, x in original.items() if kind != "ViTModel" or "pooler" not in name}
    original = {name if name in written else family.prefix + name: x for name, x in original.items()}
    assert original.keys() == written.keys()
    assert all(original[name].tobytes() == written[name].tobytes() for name in original)
    again, info = getattr(transformers, kind).from_pretrained(
        tmp_path / "ours", attn_implementation="eager", output_loading_info=True
    )
    missing = {name for name in info["missing_keys"] if kind != "ViTModel" or "pooler" not in name}
    assert not any((missing, info["unexpected_keys"], info["mismatched_keys"]))
    for name, x in their_outputs(again.eval(), config).items():
        assert relative_error(x, expected[name]) < 1e-6


@evidence("D11", oracle="transformers T5ForConditionalGeneration.generate", code="llmjax.models.t5")
def test_t5_generates_the_same(tmp_path, evidence):
    """Greedy, from the start token: the decoder over what has been written, once a step."""
    theirs = randomised(transformers.T5ForConditionalGeneration._from_config(transformers.T5Config(**T5)))
    theirs.save_pretrained(tmp_path)
    config, params = load_hf(tmp_path)
    module = config.build()
    memory = jax.jit(lambda p: module.apply({"params": p}, SOURCE, POSITIONS, method="encode"))(params)
    step = jax.jit(lambda p, written: module.apply({"params": p}, written, memory=memory)[0].argmax(-1))
    written = np.zeros((3, STEPS + 1), np.int64)
    for t in range(STEPS):
        written[:, t + 1] = step(params, written)[:, t]
    inputs = {"input_ids": torch.from_numpy(SOURCE), "attention_mask": torch.from_numpy(THERE.astype(int))}
    greedy = theirs.generate(**inputs, do_sample=False, max_new_tokens=STEPS, min_new_tokens=STEPS, num_beams=1)
    evidence.record((written != greedy.numpy()).sum(), 0)


@evidence("A42", oracle="transformers BertForMaskedLM with a table of its own", code="llmjax.nn.encoder")
def test_masked_head_with_a_table_of_its_own(evidence):
    """No BERT is written so; ours may be."""
    made = transformers.BertConfig(**BERT, tie_word_embeddings=False)
    model = randomised(transformers.BertForMaskedLM._from_config(made, attn_implementation="eager"))
    weights = {name: x.numpy() for name, x in model.state_dict().items()}
    tied = bert.from_hf_config(BERT | {"architectures": ["BertForMaskedLM"]})
    own = {"cls.predictions.bias": weights.pop("cls.predictions.decoder.bias")}
    table = weights.pop("cls.predictions.decoder.weight")
    params = import_weights(weights | own, tied, bert.FAMILY)
    params["head"]["table"] = {"kernel": table.T}
    config = replace(tied, head=MaskedHead(norm=tied.embedding_norm, tied=False))
    compare(their_outputs(model, config), our_outputs(config, params), evidence)


def test_a_head_of_its_own_of_t5(tmp_path):
    """In the published T5 1.1 embeddings and head are apart."""
    config = t5.from_hf_config(T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False})
    assert (config.tied, config.scaled) == (False, False)
    params = jax.tree.map(lambda x: RANDOM.normal(0, 0.3, x.shape).astype(np.float32), config.abstract())
    save_hf(tmp_path, config, params)
    again = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path).eval()
    expected = their_outputs(again, config)["logits"]
    assert relative_error(our_outputs(config, params)["logits"], expected) < TOLERANCE


META = "transformers model on the meta device: names, shapes and their sum"
PRESETS = [
    *(("D12 mamba", "AutoModelForCausalLM", mamba.mamba, size) for size in mamba.SIZES),
    *(("D13 mamba2", "AutoModelForCausalLM", mamba2.mamba2, size) for size in mamba2.SIZES),
    *(("D16 rwkv", "AutoModelForCausalLM", rwkv.rwkv, size) for size in rwkv.SIZES),
    *(("D16 recurrent_gemma", "AutoModelForCausalLM", recurrent_gemma.recurrent_gemma, size) for size in ("2B",)),
    ("D16 bamba", "AutoModelForCausalLM", bamba.bamba, "9B"),
    *(("D10 bert", "AutoModel", bert.bert, size) for size in bert.SIZES),
    *(("D11 t5", "AutoModelForSeq2SeqLM", t5.t5, size) for size in t5.SIZES),
    *(("D16 vit", "AutoModelForImageClassification", vit.vit, size) for size in vit.SIZES),
    *(("D16 clip", "AutoModel", clip.clip, size) for size in clip.SIZES),
]


@pytest.mark.parametrize(
    ("auto", "preset", "size"),
    [
        pytest.param(
            *case,
            id=f"{row.split()[1]}-{case[-1]}",
            marks=[
                evidence(row.split()[0], oracle=META, code=f"llmjax.models.{row.split()[1]}"),
                evidence("D18", oracle=META, code="llmjax.nn.model.Model.num_params"),
            ],
        )
        for row, *case in PRESETS
    ],
)
def test_counts_of_the_presets(auto, preset, size, evidence):
    config = preset(size)
    family = next(f for f in FAMILIES.values() if f.from_hf_config.__module__ == preset.__module__)
    theirs = transformers.AutoConfig.for_model(**family.to_hf_config(config))
    with torch.device("meta"):
        model = getattr(transformers, auto).from_config(theirs)
    evidence.record(abs(model.num_parameters() - config.num_params()), 0)
    assert sum(np.prod(shape, dtype=np.int64) for shape in shapes(config, family).values()) == model.num_parameters()
