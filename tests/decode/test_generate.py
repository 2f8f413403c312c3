"""The generation loop against its definition: full forward passes without a cache, one prompt at a time."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.config import InputError
from llmjax.decode.config import Generate
from llmjax.decode.generate import advance, begin, bucket, generate, stream
from tests.decode.models import MODELS, VOCAB, forward, full_log_probs, params_of, prompts_of
from tests.evidence import evidence

STEPS = 10


@pytest.fixture(scope="module", params=MODELS)
def case(request):
    model = MODELS[request.param]
    return model, params_of(model)


def sampled(result, row):
    return result.tokens[row, : result.lengths[row]].tolist()


@evidence("J01", oracle="repeated argmax of full forward passes", code="llmjax.decode.generate")
@evidence("J04", oracle="repeated argmax of full forward passes", code="llmjax.decode.generate")
@evidence("J02", oracle="full forward pass without a cache", code="llmjax.nn.attention")
def test_greedy_is_repeated_argmax(evidence, case):
    """Ragged batch, so left padding too; window 5 is shorter than the text. Tokens equal, log-probs to float32 sums."""
    model, params = case
    prompts = prompts_of(3, 17, 9)
    result = generate(Generate(max_tokens=STEPS, temperature=0.0), model, params, prompts)
    for row, prompt in enumerate(prompts):
        text = prompt + sampled(result, row)
        assert len(text) == len(prompt) + STEPS
        log_probs = full_log_probs(model, params, text[:-1])[len(prompt) - 1 :]
        assert log_probs.argmax(-1).tolist() == text[len(prompt) :]
        chosen = log_probs[np.arange(STEPS), text[len(prompt) :]]
        evidence.record(error=np.abs(result.model_log_probs[row] - chosen).max(), tolerance=1e-5)
        assert not result.log_probs[row].any()


@evidence("J01", oracle="law: a row does not depend on its batch", code="llmjax.decode.generate")
@pytest.mark.parametrize("name", ["window", "learned"])
def test_padding_invariance(evidence, name):
    """Each row of a ragged batch, alone: same tokens; log-probs to 1e-5, as other paddings sum in another order."""
    model, params = MODELS[name], params_of(MODELS[name])
    config, prompts = Generate(max_tokens=STEPS, temperature=0.9, top_p=0.95), prompts_of(1, 20, 6)
    keys = jax.random.split(jax.random.key(5), 3)
    together = generate(config, model, params, prompts, keys)
    for row in (0, 2):
        alone = generate(config, model, params, [prompts[row]], keys[row : row + 1])
        assert sampled(alone, 0) == sampled(together, row)
        evidence.record(error=np.abs(alone.log_probs[0] - together.log_probs[row]).max(), tolerance=1e-5)
        evidence.record(error=np.abs(alone.model_log_probs[0] - together.model_log_probs[row]).max(), tolerance=1e-5)


@evidence("J01", oracle="teacher-forced forward pass, padded and segment-packed", code="llmjax.decode.generate")
@pytest.mark.parametrize("name", ["mixed", "learned"])
def test_log_probs_are_the_trainer_s(evidence, name):
    """What the sampler says a token's log-probability was is what a training forward pass says, to 1e-5 in float32."""
    model, params = MODELS[name], params_of(MODELS[name])
    prompts = prompts_of(4, 8, 5)
    result = generate(Generate(max_tokens=STEPS), model, params, prompts, jax.random.key(2))
    np.testing.assert_allclose(result.log_probs, result.model_log_probs, atol=1e-6)  # temperature 1, nothing else on
    texts = [prompt + sampled(result, row) for row, prompt in enumerate(prompts)]
    packed = np.concatenate(texts)[None]
    positions = np.concatenate([np.arange(len(text)) for text in texts])[None]
    segments = np.concatenate([np.full(len(text), row + 1) for row, text in enumerate(texts)])[None]
    logits = forward(model, params, packed, positions, segments)
    check_rows(evidence, jax.nn.log_softmax(logits)[0], texts, np.cumsum([0, *map(len, texts)]), result)
    length = max(map(len, texts)) + 3
    padded, places, ids = np.zeros((3, length), int), np.zeros((3, length), int), np.zeros((3, length), int)
    for row, text in enumerate(texts):
        padded[row, : len(text)], places[row, : len(text)], ids[row, : len(text)] = text, np.arange(len(text)), 1
    logits = forward(model, params, padded, places, ids)
    flat = jax.nn.log_softmax(logits).reshape(3 * length, -1)
    check_rows(evidence, flat, texts, np.arange(3) * length, result)


def check_rows(evidence, log_probs, texts, starts, result):
    for row, text in enumerate(texts):
        at = starts[row] + np.arange(len(text) - STEPS - 1, len(text) - 1)
        theirs = np.asarray(log_probs)[at, text[-STEPS:]]
        evidence.record(error=np.abs(result.model_log_probs[row] - theirs).max(), tolerance=1e-5)


@evidence("J10", oracle="transformers' definitions applied to full forward passes", code="llmjax.decode.generate")
def test_processed_log_probs_are_those_of_the_sampling_distribution(evidence):
    """Penalty, temperature and top-k written out again in numpy, float64, on uncached log-probabilities."""
    model = MODELS["gqa"]
    params, prompts = params_of(model), prompts_of(5, 12)
    config = Generate(max_tokens=STEPS, repetition_penalty=1.5, temperature=0.6, top_k=6)
    result = generate(config, model, params, prompts, jax.random.key(3))
    for row, prompt in enumerate(prompts):
        text = prompt + sampled(result, row)
        logits = forward(model, params, jnp.asarray([text]))
        for step in range(STEPS):
            scores = np.asarray(logits[0, len(prompt) + step - 1], np.float64)
            seen = sorted(set(text[: len(prompt) + step]))
            scores[seen] = np.where(scores[seen] < 0, scores[seen] * 1.5, scores[seen] / 1.5)
            scores = np.where(scores < np.sort(scores)[-6], -np.inf, scores / 0.6)
            log_probs = scores - np.log(np.exp(scores).sum())
            error = abs(log_probs[text[len(prompt) + step]] - result.log_probs[row, step])
            evidence.record(error=error, tolerance=2e-5)  # 1e-5 over temperature 0.6


@pytest.mark.parametrize("every", [1, 3, 100])
def test_streaming_is_the_loop(every):
    model = MODELS["mixed"]
    params, prompts = params_of(model), prompts_of(3, 8)
    config = Generate(max_tokens=STEPS, temperature=1.3)
    whole = generate(config, model, params, prompts, jax.random.key(0))
    parts = list(stream(config, model, params, prompts, jax.random.key(0), every=every))
    assert [part.lengths[0] for part in parts] == [min(n, STEPS) for n in range(every, STEPS + every, every)]
    for part in parts:
        count = part.lengths[0]
        np.testing.assert_array_equal(part.tokens[:, :count], whole.tokens[:, :count])
        np.testing.assert_array_equal(part.log_probs[:, :count], whole.log_probs[:, :count])


@evidence("J01", oracle="law: stopping cuts the unstopped text", code="llmjax.decode.generate")
def test_stop_tokens_end_rows_one_by_one(evidence):
    """Each row is the unstopped row up to its first stop token; the others go on."""
    model = MODELS["mha"]
    params, prompts = params_of(model), prompts_of(3, 5, 9, 2)
    config = Generate(max_tokens=24, temperature=1.5)
    free = generate(config, model, params, prompts, jax.random.key(1))
    stops = (int(free.tokens[0, 2]), int(free.tokens[2, 7]))
    result = generate(config, model, params, prompts, jax.random.key(1), stops)
    for row in range(4):
        text = free.tokens[row].tolist()
        expected = next((i + 1 for i, token in enumerate(text) if token in stops), 24)
        evidence.record(error=abs(int(result.lengths[row]) - expected), tolerance=0)
        assert sampled(result, row) == text[:expected]
        assert result.stopped[row] == (text[expected - 1] in stops)
        assert not result.tokens[row, expected:].any()
        assert not result.log_probs[row, expected:].any()
    assert result.stopped.any()
    assert result.lengths.min() < result.lengths.max()


def test_min_tokens_keeps_stop_tokens_away():
    model = MODELS["mha"]
    params, prompts = params_of(model), prompts_of(4)
    first = int(generate(Generate(max_tokens=1, temperature=0.0), model, params, prompts).tokens[0, 0])
    result = generate(Generate(max_tokens=9, min_tokens=5, temperature=0.0), model, params, prompts, stop_ids=(first,))
    assert result.lengths[0] >= 5
    assert first not in result.tokens[0, :5]


def test_no_repeat_ngram_holds_over_prompt_and_answer():
    model = MODELS["mha"]
    params = params_of(model)
    result = generate(Generate(max_tokens=40, temperature=0.0, no_repeat_ngram=2), model, params, [[7, 7, 7, 9]])
    text = [7, 9, *sampled(result, 0)]
    pairs = list(itertools.pairwise(text))
    assert len(set(pairs)) == len(pairs)
    assert (7, 7) not in pairs


def test_seeds_and_keys():
    model = MODELS["mha"]
    params, prompts = params_of(model), prompts_of(4) * 2
    a = generate(Generate(max_tokens=STEPS, seed=3), model, params, prompts)
    b = generate(Generate(max_tokens=STEPS), model, params, prompts, jax.random.key(3))
    c = generate(Generate(max_tokens=STEPS, seed=4), model, params, prompts)
    np.testing.assert_array_equal(a.tokens, b.tokens)
    assert (a.tokens != c.tokens).any()
    assert (a.tokens[0] != a.tokens[1]).any(), "two rows with one prompt draw apart"


@evidence("J02", oracle="float32 cache", code="llmjax.decode.generate")
def test_bfloat16_cache_rounds_keys_and_values_only(evidence):
    """bfloat16 keeps 8 bits: keys and values are off by at most 2^-9 of themselves. Log-probs move little."""
    model = MODELS["gqa"]
    params, prompts = params_of(model), prompts_of(6, 13)
    wide = generate(Generate(max_tokens=1, temperature=0.0), model, params, prompts)
    narrow = generate(Generate(max_tokens=1, temperature=0.0, cache_dtype="bfloat16"), model, params, prompts)
    error = np.abs(wide.model_log_probs - narrow.model_log_probs).max()
    evidence.record(error=error, tolerance=0.05)
    assert error > 0, "the cache was not rounded"


def test_nothing_recompiles_for_other_prompts_steps_or_seeds():
    model = MODELS["mqa"]
    params = params_of(model)
    before = begin._cache_size(), advance._cache_size()
    for lengths, tokens, seed in (((3, 9), 20, 0), ((16, 1), 18, 1), ((12, 12), 25, 2)):
        generate(Generate(max_tokens=tokens, seed=seed, top_k=5), model, params, prompts_of(*lengths))
    assert (begin._cache_size() - before[0], advance._cache_size() - before[1]) == (1, 1)


def test_carry_is_donated():
    """The compiled loop's output shares its input's buffers: the caches are not held twice between calls."""
    model = MODELS["mha"]
    compiled = advance.lower(
        params_of(model), carry_of(model), 3, model=model, config=Generate(), width=16, stop_ids=()
    ).compile()
    memory = compiled.memory_analysis()
    caches = sum(leaf.nbytes for leaf in jax.tree.leaves(carry_of(model).state))
    assert memory.alias_size_in_bytes >= caches


def carry_of(model):
    arguments = jnp.ones((1, 16), jnp.int32), jnp.arange(16)[None], jax.random.split(jax.random.key(0), 1)
    return begin(params_of(model), *arguments, model=model, config=Generate(), slots=64, stop_ids=())


def test_bucket_is_the_smallest_size_that_fits():
    sizes = sorted({16, 24} | {2**n for n in range(4, 12)} | {3 * 2**n for n in range(3, 11)})
    for length in range(1, 2000):
        assert bucket(length) == next(size for size in sizes if size >= length)


@pytest.mark.parametrize(
    ("name", "config", "prompts", "stop_ids", "words"),
    [
        ("mha", Generate(), [], (), "prompts is empty"),
        ("mha", Generate(), [[1], []], (), "prompts[1] is empty"),
        ("mha", Generate(), [[1, VOCAB]], (), f"0 to {VOCAB - 1}"),
        ("mha", Generate(), [[-1]], (), f"0 to {VOCAB - 1}"),
        ("mha", Generate(), [[1]], (VOCAB,), f"stop token {VOCAB} is unknown"),
        ("mha", Generate(max_tokens=8, cache_length=20), [[1] * 13], (), "generate.cache_length"),
        ("learned", Generate(max_tokens=8), [[1] * 42], (), "model.positions.length"),
        ("mha", Generate(temperature=-0.5), [[1]], (), "temperature=-0.5"),
    ],
)
def test_bad_input_is_named_in_one_line(name, config, prompts, stop_ids, words):
    model = MODELS[name]
    with pytest.raises(InputError) as error:
        generate(config, model, {}, prompts, stop_ids=stop_ids)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@evidence("J01", oracle="repeated argmax of full forward passes", code="llmjax.decode.generate")
@pytest.mark.parametrize(("name", "length", "cache"), [("mha", 12, 20), ("learned", 41, None)])
def test_the_last_slot_and_position_are_used(evidence, name, length, cache):
    """The longest prompt that cache or learned positions have room for generates what full passes do."""
    model = MODELS[name]
    params, prompts = params_of(model), prompts_of(length)
    config = Generate(max_tokens=8, temperature=0.0, cache_length=cache)
    text = prompts[0] + sampled(generate(config, model, params, prompts), 0)
    log_probs = full_log_probs(model, params, text[:-1])[length - 1 :]
    evidence.record(error=(log_probs.argmax(-1) != text[length:]).sum(), tolerance=0)
