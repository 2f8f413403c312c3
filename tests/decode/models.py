"""Small models that the decoding tests share, and the slow, cache-free definition of what they must generate."""

import functools

import jax
import numpy as np

from llmjax.nn.attention import Attention
from llmjax.nn.block import Block
from llmjax.nn.decoder import Decoder
from llmjax.nn.masks import Window
from llmjax.nn.mlp import GLU, MLP
from llmjax.nn.norms import LayerNorm, RMSNorm
from llmjax.nn.positions import LearnedPositions

VOCAB = 61


def decoder(*mixers, **fields):
    """Width 32."""
    pattern = tuple(Block(mixer, GLU(d_ff=48)) for mixer in mixers)
    defaults = dict(vocab=VOCAB, d_model=32, layers=2, pattern=pattern, unroll=1)
    return Decoder(**defaults | fields)


MODELS = {
    "mha": decoder(Attention(heads=4), unroll=2),
    "gqa": decoder(Attention(heads=4, kv_heads=2)),
    "mqa": decoder(Attention(heads=4, kv_heads=1, qk_norm=RMSNorm())),
    "window": decoder(Attention(heads=2, mask=Window(5))),
    "mixed": decoder(Attention(heads=2, mask=Window(4)), Attention(heads=4, kv_heads=2)),
    "scanned": decoder(Attention(heads=2), layers=3),
    "learned": decoder(
        pattern=(Block(Attention(heads=2, rope=None, bias=True, out_bias=True), MLP(bias=True), LayerNorm()),),
        norm=LayerNorm(),
        positions=LearnedPositions(48),
        tied=True,
    ),
}


def params_of(model, seed=0):
    """Normals of 0.3, around 1 for scales, drawn by numpy: nothing to compile."""
    random = np.random.default_rng(seed)

    def draw(path, a):
        return np.float32((path[-1].key == "scale") + 0.3 * random.standard_normal(a.shape))

    return jax.tree_util.tree_map_with_path(draw, model.abstract())


@functools.partial(jax.jit, static_argnums=0)
def forward(model, params, tokens, positions=None, segment_ids=None):
    """Logits of one full forward pass without a cache, as in training."""
    return model.build().apply({"params": params}, tokens, positions, segment_ids)[0]


def full_log_probs(model, params, tokens):
    """Next-token log-probabilities after each of `tokens`, padded behind, where causal models do not look."""
    padded = np.zeros((1, 48), np.int32)
    padded[0, : len(tokens)] = tokens
    return np.asarray(jax.nn.log_softmax(forward(model, params, padded)[0]))[: len(tokens)]


def prompts_of(*lengths, seed=0):
    random = np.random.default_rng(seed)
    return [random.integers(0, VOCAB, n).tolist() for n in lengths]
