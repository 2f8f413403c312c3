"""Attention written out in numpy float64, all scores at once: what every implementation is compared with."""

import numpy as np


def visible(batch, lengths, causal=False, window=(None, None), positions=None, segments=None, counts=(None, None)):
    """[batch, query_length, key_length]: what is seen, by the words of `attention`'s docstring."""
    where = positions or tuple(np.arange(n)[None] for n in lengths)
    distance = (where[0][:, :, None] - where[1][:, None, :]) + np.zeros((batch, 1, 1), int)
    seen = (where[0] >= 0)[:, :, None] & (where[1] >= 0)[:, None, :] & np.ones(distance.shape, bool)
    seen &= (distance >= 0) | (not causal)
    seen &= distance <= (np.inf if window[0] is None else window[0])
    seen &= distance >= (-np.inf if window[1] is None else -window[1])
    if segments is not None:
        seen &= (segments[0][:, :, None] == segments[1][:, None, :]) & (segments[0] >= 0)[:, :, None]
    for axis, (count, n) in enumerate(zip(counts, lengths)):
        if count is not None:
            present = np.arange(n)[None] < np.asarray(count)[:, None]
            seen &= present[:, :, None] if axis == 0 else present[:, None, :]
    return seen


def attend(q, k, v, bias=None, seen=None, sinks=None, scale=None, cap=None):
    """Output [batch, query_length, heads, value_dim] and log-sum-exp [batch, query_length, heads]."""
    groups = q.shape[2] // k.shape[2]
    k, v = (np.repeat(np.asarray(x, np.float64), groups, axis=2) for x in (k, v))
    scores = np.einsum("btnd,bsnd->bnts", np.asarray(q, np.float64), k) * (scale or q.shape[3] ** -0.5)
    if cap is not None:
        scores = cap * np.tanh(scores / cap)
    if bias is not None:
        scores = scores + np.asarray(bias, np.float64)
    if seen is not None:
        scores = np.where(seen if seen.ndim == 4 else seen[:, None], scores, -np.inf)
    with np.errstate(divide="ignore"):
        total = np.exp(scores).sum(-1)
        if sinks is not None:
            total = total + np.exp(np.asarray(sinks, np.float64))[None, :, None]
        lse = np.log(total)
    weights = np.exp(scores) / np.where(total > 0, total, 1)[..., None]
    return np.einsum("bnts,bsnd->btnd", weights, v), lse.transpose(0, 2, 1), weights
