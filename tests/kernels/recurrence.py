"""Recurrences of linear attention as numpy float64 loops, and what their tests share."""

import jax
import numpy as np

STRENGTHS = (0.01, 1.0, 20.0)
"""Sizes of log decays that are mixed: the strongest forgets within two tokens, the weakest within hundreds."""
IDS = np.array([[-1] * 2 + [3] * 4 + [-1] + [3] * 5 + [5] * 8 + [-1], [0] * 7 + [1] * 2 + [-1] * 8 + [1] * 4], np.int32)
"""Segments of 21 tokens that begin, end and cross chunks of 8; absent tokens left, right and within."""


def inputs(*, vector, seed=0, heads=4, groups=2, key_dim=8, value_dim=6, ids=IDS):
    """Arrays in the order of the functions' arguments, and beta; keys have length 1, absent tokens are NaN."""
    rng = np.random.default_rng(seed)
    batch, length = ids.shape
    query, key = rng.standard_normal((2, batch, length, groups, key_dim))
    key /= np.linalg.norm(key, axis=-1, keepdims=True)
    value = rng.standard_normal((batch, length, heads, value_dim))
    shape = (batch, length, heads, key_dim)[: 4 if vector else 3]
    decay = -rng.exponential(size=shape) * rng.choice(STRENGTHS, size=shape)
    beta = rng.uniform(0, 1.5, size=(batch, length, heads))
    state = rng.standard_normal((batch, heads, key_dim, value_dim))
    for x in (query, key, value, decay, beta):
        x[ids < 0] = np.nan
    return query, key, value, decay, state, beta


def loop(query, key, value, decay=None, state=None, beta=None, *, bonus=None, scale=1.0, ids=None):
    """(out, state) token by token: with `beta` the delta rule, without it gated linear attention."""
    batch, length, heads, value_dim = value.shape
    key_dim = key.shape[3]
    query, key = (np.repeat(x, heads // x.shape[2], axis=2) for x in (query, key))
    decay = np.zeros((batch, length, heads)) if decay is None else decay
    decay = np.broadcast_to(decay.reshape(batch, length, heads, -1), (batch, length, heads, key_dim))
    states = np.zeros((batch, heads, key_dim, value_dim)) if state is None else np.array(state, np.float64)
    out = np.zeros(value.shape)
    for b in range(batch):
        last = None
        for t in range(length):
            if ids is not None and ids[b, t] < 0:
                continue
            if ids is not None and last is not None and ids[b, t] != last:
                states[b] = 0
            last = None if ids is None else ids[b, t]
            for h in range(heads):
                q, k, v = query[b, t, h], key[b, t, h], value[b, t, h]
                before = states[b, h]
                after = np.exp(decay[b, t, h])[:, None] * before
                if beta is not None:
                    v = beta[b, t, h] * (v - after.T @ k)
                after = after + np.outer(k, v)
                read = after if bonus is None else before + np.outer(bonus[h] * k, v)
                states[b, h], out[b, t, h] = after, scale * read.T @ q
    return out, states


def cotangents(out, state):
    """Fixed random weights: the scalar whose gradients are compared is their product with the results."""
    rng = np.random.default_rng(7)
    return rng.standard_normal(out.shape), rng.standard_normal(state.shape)


def with_gradients(function):
    """`f(*arrays) -> ((out, state), gradients of every array)`, compiled."""

    def loss(*arrays):
        results = function(*arrays)
        return sum((w * r).sum() for w, r in zip(cotangents(*results), results)), results

    def run(*arrays):
        gradients, results = jax.grad(loss, argnums=tuple(range(len(arrays))), has_aux=True)(*arrays)
        return results, gradients

    return jax.jit(run)


def slopes(function, arrays, step=1e-5):
    """For each array a direction and the central difference of the same scalar in that direction, by `function`."""
    found = []
    for i, x in enumerate(arrays):
        direction = np.random.default_rng(i).standard_normal(x.shape)
        sides = []
        for sign in (1, -1):
            results = function(*arrays[:i], x + sign * step * direction, *arrays[i + 1 :])
            sides.append(sum((w * r).sum() for w, r in zip(cotangents(*results), results)))
        found.append((direction, (sides[0] - sides[1]) / (2 * step)))
    return found


def worst(got, expected):
    """The largest difference of two lists of arrays, each as a part of the expected array's largest entry."""
    parts = []
    for a, b in zip(got, expected, strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert a.shape == b.shape
        parts.append(np.max(np.abs(a - b)) / max(np.max(np.abs(b)), 1e-30))
    assert np.isfinite(parts).all()
    return max(parts)


def product_flops(function, *arguments):
    """Floating-point operations of all matrix products of `function`, those in a loop as often as it runs."""
    return _flops(jax.make_jaxpr(function)(*arguments).jaxpr)


def _flops(jaxpr):
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            total += 2 * equation.outvars[0].aval.size * int(np.prod([shape[axis] for axis in contracted]))
        inner = [getattr(p, "jaxpr", p) for p in equation.params.values() if hasattr(getattr(p, "jaxpr", p), "eqns")]
        total += equation.params.get("length", 1) * sum(_flops(j) for j in inner)
    return total
