"""Tiny random BERT and T5 models of transformers beside ours: states, pooled states, logits, with padding."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from llmjax.config import validate
from llmjax.nn.attention import Attention
from llmjax.nn.block import Block
from llmjax.nn.cross_attention import CrossAttention
from llmjax.nn.encoder import Encoder, MaskedHead
from llmjax.nn.encoder_decoder import EncoderDecoder, Tower
from llmjax.nn.mlp import GLU, MLP
from llmjax.nn.norms import LayerNorm, RMSNorm
from llmjax.nn.positions import LearnedPositions
from llmjax.nn.t5_bias import T5Bias
from tests.evidence import evidence
from tests.models.golden import relative_error

pytestmark = pytest.mark.parity
TOLERANCE = 2e-5
"""Reordered float32 sums of tens of terms err by a few times 6e-8 a layer; a wrong formula errs by 1e-3 and more."""
VOCAB, D, HEADS, HEAD_DIM, FF, LAYERS = 41, 24, 3, 10, 40, 2
RANDOM = np.random.default_rng(1)
SOURCE, TARGET = (RANDOM.integers(0, VOCAB, shape) for shape in ((3, 17), (3, 9)))
THERE = np.arange(17) < np.array([[17], [12], [5]])


def randomised(model):
    """The model with every parameter normal, and its weights as numpy arrays."""
    random = np.random.default_rng(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.from_numpy(random.normal(0, 0.3, parameter.shape).astype(np.float32)))
    return model.eval(), {name: tensor.numpy() for name, tensor in model.state_dict().items()}


def positions_of(there):
    """Ours of theirs: counted from 0, -1 for padding."""
    return jnp.asarray(np.where(there, np.arange(there.shape[1]), -1), jnp.int32)


def stacked(layer):
    """The parameters of all layers under our path of the first block."""
    return jax.tree.map(lambda *leaves: np.stack(leaves), *map(layer, range(LAYERS)))


def ours(model, params, *arguments, method="__call__", **named):
    """Our model on their numbers; every parameter of ours must have one of theirs."""
    validate(model)
    assert jax.tree.structure(model.abstract()) == jax.tree.structure(params)
    for abstract, leaf in zip(jax.tree.leaves(model.abstract()), jax.tree.leaves(params), strict=True):
        assert abstract.shape == leaf.shape
    return jax.jit(lambda p: model.build().apply({"params": p}, *arguments, method=method, **named))(params)


def bert():
    config = transformers.BertConfig(
        vocab_size=VOCAB,
        hidden_size=D,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=FF,
        max_position_embeddings=32,
        attn_implementation="eager",
    )
    norm = LayerNorm(eps=config.layer_norm_eps)
    attention = Attention(heads=HEADS, causal=False, rope=None, bias=True, out_bias=True)
    block = Block(mixer=attention, mlp=MLP(d_ff=FF, activation="gelu", bias=True), norm=norm, order="post")
    encoder = Encoder(
        vocab=VOCAB,
        d_model=D,
        layers=LAYERS,
        pattern=(block,),
        norm=None,
        positions=LearnedPositions(32),
        embedding_norm=norm,
        token_types=2,
        pooler=True,
        head=None,
    )
    return config, encoder


def dense(weights, name, *outputs):
    kernel, bias = weights[f"{name}.weight"].T, weights[f"{name}.bias"]
    return {"kernel": kernel.reshape(len(kernel), *outputs or (-1,)), "bias": bias.reshape(outputs or (-1,))}


def scaled(weights, name):
    return {"scale": weights[f"{name}.weight"], "bias": weights[f"{name}.bias"]}


def bert_params(weights, prefix=""):
    def layer(i):
        name = f"{prefix}encoder.layer.{i}"
        mixer = {part: dense(weights, f"{name}.attention.self.{part}", HEADS, -1) for part in ("query", "key", "value")}
        out = dense(weights, f"{name}.attention.output.dense")
        mixer["out"] = {"kernel": out["kernel"].reshape(HEADS, -1, D), "bias": out["bias"]}
        return {
            "mixer": mixer,
            "mixer_norm": scaled(weights, f"{name}.attention.output.LayerNorm"),
            "mlp": {
                "up": dense(weights, f"{name}.intermediate.dense"),
                "down": dense(weights, f"{name}.output.dense"),
            },
            "mlp_norm": scaled(weights, f"{name}.output.LayerNorm"),
        }

    tables = {"embed": "word", "positions": "position", "types": "token_type"}
    tables = {ours: weights[f"{prefix}embeddings.{name}_embeddings.weight"] for ours, name in tables.items()}
    return {name: {"embedding": table} for name, table in tables.items()} | {
        "embedding_norm": scaled(weights, f"{prefix}embeddings.LayerNorm"),
        "blocks": {"0": stacked(layer)},
    }


@evidence("A42", oracle="transformers BertModel", code="llmjax.nn.encoder")
def test_bert_states_and_pooled(evidence):
    """Both kinds of token, rows of three lengths; what padding holds is compared nowhere."""
    config, encoder = bert()
    model, weights = randomised(transformers.BertModel(config))
    types = RANDOM.integers(0, 2, SOURCE.shape)
    inputs = {"input_ids": SOURCE, "attention_mask": THERE.astype(int), "token_type_ids": types}
    theirs = model(**{name: torch.from_numpy(x) for name, x in inputs.items()})
    params = bert_params(weights) | {"pooler": dense(weights, "pooler.dense")}
    found = ours(encoder, params, SOURCE, positions_of(THERE), None, True, types, method="encode")
    evidence.record(relative_error(found.states[THERE], theirs.last_hidden_state.detach().numpy()[THERE]), TOLERANCE)
    evidence.record(relative_error(found.pooled, theirs.pooler_output.detach().numpy()), TOLERANCE)


@evidence("A42", oracle="transformers BertForMaskedLM", code="llmjax.nn.encoder")
@pytest.mark.parametrize("tied", [True, False])
def test_bert_masked_logits(tied, evidence):
    config, encoder = bert()
    config.tie_word_embeddings = tied
    model, weights = randomised(transformers.BertForMaskedLM(config))
    theirs = model(torch.from_numpy(SOURCE), torch.from_numpy(THERE.astype(int))).logits.detach().numpy()
    head = {
        "dense": dense(weights, "cls.predictions.transform.dense"),
        "norm": scaled(weights, "cls.predictions.transform.LayerNorm"),
        "bias": weights["cls.predictions.decoder.bias"],
    }
    if not tied:
        head["table"] = {"kernel": weights["cls.predictions.decoder.weight"].T}
    masked = dataclasses.replace(encoder, pooler=False, head=MaskedHead(norm=encoder.embedding_norm, tied=tied))
    params = bert_params(weights, "bert.") | {"head": head}
    logits, _ = ours(masked, params, SOURCE, positions_of(THERE))
    evidence.record(relative_error(logits[THERE], theirs[THERE]), TOLERANCE)


def t5(gated):
    config = transformers.T5Config(
        vocab_size=VOCAB,
        d_model=D,
        d_kv=HEAD_DIM,
        d_ff=FF,
        num_layers=LAYERS,
        num_decoder_layers=LAYERS,
        num_heads=HEADS,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=12,
        feed_forward_proj="gated-gelu" if gated else "relu",
        tie_word_embeddings=not gated,
        decoder_start_token_id=0,
        attn_implementation="eager",
    )
    heads = {"heads": HEADS, "head_dim": HEAD_DIM, "scale": 1.0}
    mlp = GLU(d_ff=FF, activation="gelu_tanh") if gated else MLP(d_ff=FF, activation="relu")
    shape = {"d_model": D, "layers": LAYERS, "distance": T5Bias(8, 12)}
    encoder = Tower(pattern=(Block(Attention(causal=False, rope=None, **heads), mlp, RMSNorm()),), **shape)
    decoder = Block(Attention(rope=None, **heads), mlp, RMSNorm(), cross=CrossAttention(**heads))
    towers = {"encoder": encoder, "decoder": Tower(pattern=(decoder,), **shape)}
    return config, EncoderDecoder(vocab=VOCAB, tied=not gated, scaled=not gated, **towers)


def t5_params(weights, gated):
    def attention(name):
        split = {
            part: weights[f"{name}.{part[0]}.weight"].T.reshape(D, HEADS, -1) for part in ("query", "key", "value")
        }
        kernels = split | {"out": weights[f"{name}.o.weight"].T.reshape(HEADS, -1, D)}
        return {part: {"kernel": kernel} for part, kernel in kernels.items()}

    def tower(name, layers):
        def layer(i):
            parts = (
                {"mixer": "SelfAttention", "cross": "EncDecAttention"} if layers == 3 else {"mixer": "SelfAttention"}
            )
            block, found = f"{name}.block.{i}.layer", {}
            for at, (part, theirs) in enumerate(parts.items()):
                found[part] = attention(f"{block}.{at}.{theirs}")
                found[f"{part}_norm"] = {"scale": weights[f"{block}.{at}.layer_norm.weight"]}
            names = {"gate": "wi_0", "up": "wi_1", "down": "wo"} if gated else {"up": "wi", "down": "wo"}
            mlp = f"{block}.{layers - 1}.DenseReluDense"
            found["mlp"] = {part: {"kernel": weights[f"{mlp}.{theirs}.weight"].T} for part, theirs in names.items()}
            found["mlp_norm"] = {"scale": weights[f"{block}.{layers - 1}.layer_norm.weight"]}
            return found

        table = f"{name}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        return {
            "blocks": {"0": stacked(layer)},
            "distance": {"embedding": weights[table].T},
            "norm": {"scale": weights[f"{name}.final_layer_norm.weight"]},
        }

    found = {"embed": {"embedding": weights["shared.weight"]}}
    found |= {"encoder": tower("encoder", 2), "decoder": tower("decoder", 3)}
    return found | ({"head": {"kernel": weights["lm_head.weight"].T}} if gated else {})


@evidence("A43", oracle="transformers T5Model and T5ForConditionalGeneration", code="llmjax.nn.encoder_decoder")
@evidence("A05", oracle="transformers T5 cross-attention", code="llmjax.nn.cross_attention")
@pytest.mark.parametrize("gated", [False, True], ids=["v1.0 relu", "v1.1 gated-gelu"])
def test_t5(gated, evidence):
    """States and logits; the source has padding. T5 1.1 has a head of its own, which theirs is given here."""
    config, model = t5(gated)
    theirs = transformers.T5ForConditionalGeneration(config)
    if gated:
        theirs.lm_head.weight = torch.nn.Parameter(torch.zeros(VOCAB, D))
    theirs, weights = randomised(theirs)
    inputs = {"input_ids": SOURCE, "attention_mask": THERE.astype(int), "decoder_input_ids": TARGET}
    result = theirs(**{name: torch.from_numpy(x) for name, x in inputs.items()}, output_hidden_states=True)
    params, source = t5_params(weights, gated), {"source": SOURCE, "source_positions": positions_of(THERE)}
    memory = ours(model, params, SOURCE, positions_of(THERE), method="encode")
    states = result.encoder_last_hidden_state.detach().numpy()
    evidence.record(relative_error(memory.states[THERE], states[THERE]), TOLERANCE)
    features, _ = ours(model, params, TARGET, method="features", **source)
    last = result.decoder_hidden_states[-1].detach().numpy() / (1 if gated else D**0.5)
    evidence.record(relative_error(features.hidden, last), TOLERANCE)
    logits, _ = ours(model, params, TARGET, **source)
    evidence.record(relative_error(logits, result.logits.detach().numpy()), TOLERANCE)
