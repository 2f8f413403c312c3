"""Samplers against transformers' processors (stored numbers), closed forms, brute force, and the laws of chance."""

import importlib.util
import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.config import ConfigError, validate
from llmjax.decode import samplers
from llmjax.decode.config import Generate
from tests.evidence import evidence

GOLDEN = Path(__file__).parent / "golden" / "samplers.npz"
SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "golden_samplers.py"
PROMPT = 20


def golden_script():
    """The script that made the golden file, as a module."""
    spec = importlib.util.spec_from_file_location("golden_samplers", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


CASES = golden_script().CASES


def ours(name, logits, history):
    """Our scores for a case of the golden file."""
    kind, _, value = name.rpartition("_")
    function, value = getattr(samplers, kind), float(value)
    if kind == "repetition_penalty":
        return function(logits, history, value)
    if kind == "no_repeat_ngram":
        return function(logits, history, history.shape[1], int(value))
    if kind == "min_tokens":
        return function(logits, history.shape[1] - PROMPT, int(value), (3, 8))
    return function(logits, int(value) if kind == "top_k" else value)


def compare(evidence, mine, theirs):
    """The kept tokens are the same; of those, the scores are too, to one float32 rounding of a product or quotient."""
    mine = np.asarray(mine)
    np.testing.assert_array_equal(np.isneginf(mine), np.isneginf(theirs))
    kept = ~np.isneginf(theirs)
    evidence.record(error=np.abs(mine[kept] - theirs[kept]).max(), tolerance=2e-6)


@evidence("J05", oracle="transformers TemperatureLogitsWarper", code="llmjax.decode.samplers.temperature")
@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("temperature")])
def test_temperature_golden(evidence, name):
    data = np.load(GOLDEN)
    compare(evidence, ours(name, data["logits"], data["history"]), data[name])


@evidence("J06", oracle="transformers TopKLogitsWarper", code="llmjax.decode.samplers.top_k")
@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("top_k")])
def test_top_k_golden(evidence, name):
    data = np.load(GOLDEN)
    compare(evidence, ours(name, jnp.asarray(data["logits"]), data["history"]), data[name])


@evidence("J07", oracle="transformers TopPLogitsWarper", code="llmjax.decode.samplers.top_p")
@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("top_p")])
def test_top_p_golden(evidence, name):
    data = np.load(GOLDEN)
    rows = slice(None, 4)  # rows 4 and 5 have ties, which torch's sort (unstable) keeps in no stated order
    compare(evidence, ours(name, jnp.asarray(data["logits"]), data["history"])[rows], data[name][rows])


@evidence("J10", oracle="transformers logits processors and MinPLogitsWarper", code="llmjax.decode.samplers")
@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith(("temperature", "top"))])
def test_processors_golden(evidence, name):
    data = np.load(GOLDEN)
    compare(evidence, ours(name, jnp.asarray(data["logits"]), jnp.asarray(data["history"])), data[name])


@pytest.mark.parity
def test_golden_file_is_what_transformers_computes():
    script, data = golden_script(), np.load(GOLDEN)
    logits, history = script.inputs()
    np.testing.assert_array_equal(data["logits"], logits)
    for name in CASES:
        np.testing.assert_array_equal(data[name], script.golden(name, logits, history), err_msg=name)


@pytest.mark.parity
@evidence("J10", oracle="transformers generate, all processors at once", code="llmjax.decode.samplers.process")
def test_order_of_processors_live(evidence):
    """The composition has the order of `generate`: its own list of processors gives the same distribution."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    settings = dict(temperature=0.7, top_k=30, top_p=0.8, min_p=0.02, repetition_penalty=1.4)
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=97, n_embd=8, n_layer=1, n_head=1, bos_token_id=0, eos_token_id=3, pad_token_id=0)
    )
    torch.manual_seed(0)
    prompt = torch.randint(1, 97, (1, 20))
    made = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=True,
        max_new_tokens=6,
        min_new_tokens=6,
        no_repeat_ngram_size=2,
        output_scores=True,
        output_logits=True,
        return_dict_in_generate=True,
        **settings,
    )
    config = Generate(max_tokens=6, min_tokens=6, no_repeat_ngram=2, **settings)
    for step, (logits, scores) in enumerate(zip(made.logits, made.scores, strict=True)):
        history = made.sequences[:, : 20 + step].numpy()
        mine = samplers.process(jnp.asarray(logits.numpy()), config, jnp.asarray(history), 20 + step, step, (3,))
        theirs = torch.log_softmax(scores.float(), -1).numpy()
        np.testing.assert_array_equal(np.isneginf(mine), np.isneginf(theirs))
        kept = ~np.isneginf(theirs)
        evidence.record(error=np.abs(np.asarray(mine)[kept] - theirs[kept]).max(), tolerance=2e-6)


@evidence("J07", oracle="brute force: smallest set with mass at least p", code="llmjax.decode.samplers.top_p")
def test_top_p_is_the_smallest_set(evidence):
    """Of all 2^8 sets with mass >= p ours has the fewest tokens, and the most mass of those."""
    logits = jax.random.normal(jax.random.key(0), (20, 8)) * 2
    masks = (np.arange(256)[:, None] >> np.arange(8)) & 1
    wrong = 0
    for p in (0.1, 0.5, 0.9, 0.99):
        kept = np.isfinite(np.asarray(samplers.top_p(logits, p)))
        probs = np.asarray(jax.nn.softmax(logits), np.float64)
        for row in range(20):
            mass = masks @ probs[row]
            enough = np.flatnonzero(mass >= p)
            best = min(enough, key=lambda i: (masks[i].sum(), -mass[i]))
            wrong += int((masks[best] != kept[row]).any())
    evidence.record(error=wrong, tolerance=0)


@evidence("J07", oracle="identity at p = 1", code="llmjax.decode.samplers.process")
@evidence("J06", oracle="identity at k = vocabulary", code="llmjax.decode.samplers.process")
def test_identities(evidence):
    logits = jax.random.normal(jax.random.key(0), (3, 40)) * 5
    chex.assert_trees_all_equal(samplers.top_k(logits, 40), logits)
    chex.assert_trees_all_equal(samplers.min_p(logits, 0.0), logits)
    plain = jax.nn.log_softmax(logits)
    none = jnp.full((3, 4), -1)
    for config in (Generate(top_p=1.0), Generate(top_k=40), Generate(top_k=0), Generate(repetition_penalty=1.0)):
        mine = samplers.process(logits, config, none, 4, 0)
        evidence.record(error=jnp.abs(mine - plain).max(), tolerance=0)


@evidence("J04", oracle="numpy argmax", code="llmjax.decode.samplers.process")
def test_greedy_is_top_k_1_and_temperature_0(evidence):
    """Three ways to say greedy give one point mass: temperature 0, top-k 1, and top-p below the largest probability."""
    logits = jax.random.normal(jax.random.key(0), (30, 50))
    none = jnp.full((30, 2), -1)
    for config in (Generate(temperature=0.0), Generate(top_k=1), Generate(top_p=1e-6), Generate(min_p=1.0)):
        log_probs = np.asarray(samplers.process(logits, config, none, 2, 0))
        assert (np.isfinite(log_probs).sum(-1) == 1).all()
        evidence.record(error=(log_probs.argmax(-1) != np.argmax(logits, -1)).sum(), tolerance=0)
        evidence.record(error=np.abs(log_probs.max(-1)).max(), tolerance=0)


@evidence("J05", oracle="chi-square test, closed-form softmax", code="llmjax.decode.samplers.draw")
@pytest.mark.parametrize("value", [0.5, 1.0, 2.0])
def test_draws_follow_the_tempered_distribution(evidence, value):
    """20000 draws over 12 tokens. Chi-square with 11 degrees of freedom exceeds 31.3 for one seed in 1000."""
    logits = np.linspace(-1, 1.5, 12, dtype=np.float32)
    config, count = Generate(temperature=value), 20000
    log_probs = samplers.process(jnp.tile(logits, (count, 1)), config, jnp.full((count, 1), -1), 1, 0)
    keys = jax.random.split(jax.random.key(1), count)
    drawn = np.bincount(np.asarray(jax.jit(samplers.draw)(log_probs, keys, 3)), minlength=12)
    target = np.exp(logits / value) / np.exp(logits / value).sum() * count
    evidence.record(error=((drawn - target) ** 2 / target).sum(), tolerance=31.3)


@evidence("J05", oracle="law: entropy grows with temperature", code="llmjax.decode.samplers.temperature")
def test_entropy_is_monotone_in_temperature(evidence):
    logits = jax.random.normal(jax.random.key(0), (10, 50)) * 3

    def entropy(value):
        log_p = jax.nn.log_softmax(samplers.temperature(logits, value))
        return -(jnp.exp(log_p) * log_p).sum(-1)

    entropies = jnp.stack([entropy(value) for value in (0.1, 0.3, 0.7, 1.0, 1.5, 4.0)])
    evidence.record(error=(jnp.diff(entropies, axis=0) <= 0).sum(), tolerance=0)


@evidence("J10", oracle="brute-force n-gram search", code="llmjax.decode.samplers.no_repeat_ngram")
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_no_repeat_ngram_brute_force(evidence, size):
    """Ragged rows with padding on the left and unused slots on the right; three tokens, so that runs do repeat."""
    random, wrong = np.random.default_rng(size), 0
    for end in (1, 2, 5, 14):
        history = np.full((8, 17), -1)
        for row in range(8):
            length = random.integers(1, end + 1)
            history[row, end - length : end] = random.integers(0, 3, length)
        scores = samplers.no_repeat_ngram(jnp.zeros((8, 5)), jnp.asarray(history), end, size)
        for row in range(8):
            text = [t for t in history[row].tolist() if t >= 0]
            runs = [tuple(text[i : i + size]) for i in range(len(text) - size + 1)]
            recent = tuple(text[len(text) - size + 1 :]) if len(text) >= size - 1 else None
            banned = [recent is not None and (*recent, v) in runs for v in range(5)]
            wrong += int((np.isneginf(scores[row]) != banned).sum())
    evidence.record(error=wrong, tolerance=0)


class JittedAlike(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_processors_compile_with_traced_slots(self):
        logits = jax.random.normal(jax.random.key(0), (2, 20))
        history = jax.random.randint(jax.random.key(1), (2, 9), 0, 20).at[:, 7:].set(-1)
        config = Generate(repetition_penalty=1.2, no_repeat_ngram=2, min_tokens=3, top_k=9, top_p=0.9, min_p=0.01)
        run = self.variant(lambda end, step: samplers.process(logits, config, history, end, step, (4,)))
        log_probs = run(jnp.asarray(7), jnp.asarray(2))
        chex.assert_trees_all_close(jnp.exp(log_probs).sum(-1), jnp.ones(2), atol=1e-6)
        assert np.isneginf(log_probs[:, 4]).all()


def test_draw_of_a_row_depends_on_its_key_and_row_only():
    logits = jax.nn.log_softmax(jax.random.normal(jax.random.key(0), (5, 30)))
    keys = jax.random.split(jax.random.key(1), 5)
    together = samplers.draw(logits, keys, 7)
    alone = [int(samplers.draw(logits[i : i + 1], keys[i : i + 1], 7)[0]) for i in range(5)]
    assert together.tolist() == alone
    assert samplers.draw(logits, keys, 8).tolist() != alone


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_k": -2}, "top_k=-2"),
        ({"min_p": 1.5}, "min_p=1.5"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0"),
        ({"max_tokens": 0}, "max_tokens=0"),
        ({"max_tokens": 4, "min_tokens": 5}, "min_tokens=5"),
        ({"no_repeat_ngram": -1}, "no_repeat_ngram=-1"),
        ({"stop": ("a", "")}, "stop="),
        ({"seed": -1}, "seed=-1"),
        ({"cache_length": 128}, "cache_length=128"),
        ({"cache_dtype": "int8"}, "cache_dtype='int8'"),
        ({"temperature": float("nan")}, "temperature=nan"),
    ],
)
def test_bad_fields_are_named(fields, named):
    with pytest.raises(ConfigError) as error:
        validate(Generate(**fields))
    assert named in str(error.value)
    assert "\n" not in str(error.value)
