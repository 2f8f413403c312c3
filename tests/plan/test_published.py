"""The roofline against step times that MaxText publishes for its tuned configs (its tables of optimised models).

Each case lists the work of one chip by hand: every matrix product of a layer forward, backward and where the published
remat policy computes it again; attention; the elementwise passes over the activations; the optimizer; and the traffic
of FSDP over all chips, which their flags let overlap. The planner's reading of compiled programs takes no part.

Constants that were fitted to these rows: `matmul_efficiency` of v5p and v6e, one number a chip. With the others fixed,
four rows on two numbers leave two that could have failed.
"""

from dataclasses import dataclass

import pytest

from llmjax.plan.chips import CHIPS
from llmjax.plan.collectives import Collective
from llmjax.plan.network import rate
from llmjax.plan.roofline import terms
from llmjax.plan.work import Work

BF16 = 2


@dataclass(frozen=True)
class Row:
    """One published row: the shape of the model, the chips, the rows a chip, what is computed twice, tokens/s/chip."""

    chip: str
    slice: tuple[int, ...]
    layers: int
    d_model: int
    kv_heads: int
    d_ff: int
    vocab: int
    length: int
    rows: int
    again: frozenset[str]
    published: float
    head_dim: int = 128

    @property
    def tokens(self) -> int:
        return self.rows * self.length

    @property
    def weights(self) -> dict[str, tuple[int, int]]:
        d, kv, ff = self.d_model, self.kv_heads * self.head_dim, self.d_ff
        named = dict(query=(d, d), key=(d, kv), value=(d, kv), out=(d, d), gate=(d, ff), up=(d, ff))
        return named | {"down": (ff, d)}

    @property
    def params(self) -> float:
        return self.layers * sum(k * n for k, n in self.weights.values()) + 2 * self.vocab * self.d_model


ROWS = {
    # decoder_layer_input, out_proj, query, key and value are offloaded to the host: the MLP and attention run again.
    "Llama 3.1 8B, v6e-256": Row(
        *("v6e", (16, 16), 32, 4096, 8, 14336, 128256, 8192, 4), frozenset({"gate", "up", "attention"}), 7207
    ),
    "Llama 3.1 70B, v6e-256": Row(
        *("v6e", (16, 16), 80, 8192, 8, 28672, 128256, 8192, 4), frozenset({"out", "gate", "up", "attention"}), 960
    ),
    "Llama 2 70B, v6e-256": Row(
        *("v6e", (16, 16), 80, 8192, 8, 28672, 32000, 4096, 2), frozenset({"out", "gate", "up", "attention"}), 900
    ),
    # save_dot_except_mlpwi; v5p-512 are 256 chips of two cores.
    "Llama 2 70B, v5p-512": Row(
        *("v5p", (4, 8, 8), 80, 8192, 8, 28672, 32000, 4096, 4), frozenset({"gate", "up", "attention"}), 692
    ),
}


def products(row):
    """Matrix products of a layer: forward, backward by input and by weight, and again."""
    for name, (k, n) in row.weights.items():
        flops = 2 * row.tokens * k * n
        moved = BF16 * (row.tokens * (k + n) + k * n)
        yield Work(name, "layers", row.layers * (3 + (name in row.again)), flops, moved)


def attention(row):
    """Causal: half of all pairs; the fused backward pass does 5 products where the forward pass does 2."""
    forward = 2 * row.tokens * row.length * row.d_model
    moved = BF16 * row.tokens * 2 * (row.d_model + row.kv_heads * row.head_dim)
    times = 1 + ("attention" in row.again)
    yield Work("attention", "layers", row.layers * times, forward, moved, kernel=True)
    yield Work("attention backward", "layers", row.layers, 2.5 * forward, 2 * moved, kernel=True)


def elementwise(row):
    """Two norms (read, write), two sums (two reads, a write), rotations, the gated product; backward twice that."""
    features = 2 * 2 * row.d_model + 2 * 3 * row.d_model + 3 * row.d_ff
    features += 2 * (row.d_model + row.kv_heads * row.head_dim)
    yield Work("elementwise", "layers", row.layers * 4, 0.0, BF16 * row.tokens * features)


def ends(row, chips):
    """The head's three products, its float32 logits (written, read twice, their gradient), and AdamW in float32."""
    k, n = row.d_model, row.vocab
    yield Work("head", "ends", 3, 2 * row.tokens * k * n, BF16 * (row.tokens * k + k * n))
    yield Work("loss", "ends", 1, 0.0, 4 * 4 * row.tokens * n)
    yield Work("optimizer", "ends", 1, 0.0, 7 * 4 * row.params / chips)


def estimate(row):
    """Seconds of a step."""
    chip = CHIPS[row.chip]
    places = [(x, y, z) for x in range(row.slice[0]) for y in range(row.slice[1]) for z in range((*row.slice, 1)[2])]
    places = [place[: len(row.slice)] for place in places]
    sent = BF16 * row.params * (len(places) - 1) / len(places)
    group = tuple(range(len(places)))
    # Weights are gathered for the forward and the backward pass, gradients scattered once.
    fsdp = Collective("fsdp", "all-gather", "layers", 3.0, sent, group, asynchronous=True)
    works = [*products(row), *attention(row), *elementwise(row), *ends(row, len(places))]
    names = {work.name for work in works}
    return terms(chip, works, [(fsdp, rate(chip, row.slice, places))], lambda computation: names)


@pytest.mark.parametrize("name", ROWS)
def test_the_roofline_reproduces_published_step_times(name):
    """Within 15 %: what the published row needs for a step, tokens a chip over its tokens/s/chip."""
    row = ROWS[name]
    published = row.tokens / row.published
    assert estimate(row).step == pytest.approx(published, rel=0.15)


def test_published_utilisation_is_what_its_tokens_a_second_say():
    """The rows are read rightly: 7,207 tokens/s x (6 N + 12 L d length) FLOPs are the 45.46 % of v6e they print."""
    row = ROWS["Llama 3.1 8B, v6e-256"]
    flops = 6 * (row.params - row.vocab * row.d_model) + 12 * row.layers * row.d_model * row.length
    assert row.published * flops / CHIPS["v6e"].flops == pytest.approx(0.4546, abs=0.001)
