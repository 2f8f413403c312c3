"""What the golden and the live tests share: our model's loss, logits and gradients under transformers' names."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from llmjax.models import mapping
from llmjax.models.families import family_of
from llmjax.objectives.next_token import NextToken

FOLDER = Path(__file__).resolve().parent / "golden"
TOLERANCE = 2e-5
"""Reordered float32 sums of tens of terms err by a few times 6e-8 a layer; a wrong formula errs by 1e-3 and more."""


def expected(name):
    return load_file(FOLDER / name / "expected.safetensors")


def random_params(config, seed=0):
    """Normal parameters, biases and norms included, drawn by numpy: nothing to compile."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32), config.abstract())


@functools.partial(jax.jit, static_argnums=0)
def logits(config, params, tokens):
    return config.build().apply({"params": params}, jnp.asarray(tokens))[0]


def apply_of(config):
    module = config.build()

    def apply(params, tokens, *, positions=None, segment_ids=None, key=None, method="__call__"):
        return module.apply({"params": params}, tokens, positions, segment_ids, method=method)[0]

    return apply


def loss(config, params, tokens, labels):
    """The token mean over labels other than -100, each predicted from the tokens before it."""
    inputs, targets = tokens[:, :-1], labels[:, 1:]
    batch = {
        "tokens": jnp.asarray(inputs),
        "targets": jnp.asarray(np.maximum(targets, 0)),
        "loss_mask": jnp.asarray(targets >= 0, jnp.float32),
        "positions": jnp.broadcast_to(jnp.arange(inputs.shape[1]), inputs.shape),
        "segment_ids": jnp.ones(inputs.shape, jnp.int32),
        "target_bytes": jnp.ones(inputs.shape, jnp.int32),
    }
    return NextToken(chunk=8).loss(apply_of(config), params, batch, None)[0]


def gradients(config, params, tokens, labels):
    """Gradient of the loss by transformers' tensor: the layout is a permutation, so gradients map like weights."""
    grads = jax.jit(jax.grad(lambda p: loss(config, p, tokens, labels)))(params)
    return mapping.export_weights(grads, config, family_of(config))


def relative_error(ours, theirs):
    """Largest absolute difference, as a part of the largest absolute value of theirs."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape
    return np.abs(ours - theirs).max() / np.abs(theirs).max()


def worst_gradient_error(config, params, results):
    """The largest relative error over all tensors; both sides must have the same tensors."""
    ours = gradients(config, params, results["tokens"], results["labels"])
    theirs = {name.removeprefix("grad."): g for name, g in results.items() if name.startswith("grad.")}
    assert ours.keys() == theirs.keys()
    return max(relative_error(ours[name], theirs[name]) for name in theirs)
