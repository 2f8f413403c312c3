"""Virtual tokens and prefixes: the real tokens that they may stand for, packing, decoding and folding."""

import dataclasses
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.adapters import Adapted
from llmjax.adapters.bottleneck import Bottleneck
from llmjax.adapters.compacter import Compacter
from llmjax.adapters.fold import folded
from llmjax.adapters.mixture import Mixture
from llmjax.adapters.p_tuning import PTuning
from llmjax.adapters.prefix import PrefixTuning, prefix_of
from llmjax.adapters.prompt import PromptTuning
from llmjax.adapters.unipelt import unipelt
from llmjax.config import ConfigError, validate
from llmjax.data import Bytes, Data, FirstFit, Padded
from llmjax.decode.config import Generate
from llmjax.decode.generate import generate
from llmjax.experiment import Experiment
from llmjax.models.gpt2 import gpt2
from llmjax.nn.attention import Attention
from llmjax.nn.block import Block
from llmjax.nn.decoder import Decoder
from llmjax.nn.encoder import Encoder
from llmjax.nn.mamba import Mamba
from llmjax.nn.mla import MLA
from llmjax.nn.mlp import GLU
from llmjax.nn.model import flat, merged, split
from llmjax.nn.multi_token import MultiToken
from llmjax.nn.positions import LearnedPositions
from llmjax.parallel.mesh import MeshConfig
from tests.adapters.cases import TOKENS, logits_of, shaken
from tests.evidence import evidence

pytestmark = pytest.mark.adapters

GPT2 = dataclasses.replace(gpt2("18M", vocab=11), d_model=8, layers=2, positions=LearnedPositions(32))
GPT2 = dataclasses.replace(
    GPT2, pattern=(dataclasses.replace(GPT2.pattern[0], mixer=dataclasses.replace(GPT2.pattern[0].mixer, heads=2)),)
)
"""Learned positions and a tied head."""
GROUPED = Block(mixer=Attention(heads=2, kv_heads=1), mlp=GLU(d_ff=12))
LATENT = Block(mixer=MLA(heads=2, kv_rank=4, nope_dim=4, rope_dim=2, value_dim=4, q_rank=None), mlp=GLU(d_ff=12))
BASES = {
    "gpt2": GPT2,
    "rotary and Mamba": Decoder(
        vocab=11, d_model=8, layers=4, pattern=(GROUPED, Block(mixer=Mamba(d_state=4))), unroll=1
    ),
    "latent": Decoder(vocab=11, d_model=8, layers=2, pattern=(LATENT,), remat="full"),
}
FRONT = np.array([3, 7, 1], np.int32)
bases = pytest.mark.parametrize("kind", BASES)


def relative(mine, theirs):
    """Largest difference over the largest value."""
    return float(np.abs(mine - theirs).max() / np.abs(theirs).max())


@cache
def params_of(base):
    """The base's parameters, its matrices large enough for tokens to see each other."""
    return jax.tree.map(lambda x: 8 * x if x.ndim > 1 else x, base.init(jax.random.key(0)))


def adapted(base, *adapters):
    """A model with adapters, and its parameters as they start."""
    model = Adapted(base=base, adapters=adapters)
    validate(model)
    return model, jax.jit(model.init)(jax.random.key(1), params_of(base))


def whole(base, tokens):
    """The base's logits of the tokens in a row."""
    return jax.jit(lambda params, tokens: base.build().apply({"params": params}, tokens)[0])(params_of(base), tokens)


def before(tokens):
    """The tokens after those of FRONT."""
    return np.concatenate([np.broadcast_to(FRONT, (len(tokens), 3)), tokens], axis=1)


@evidence("G26", oracle="the base with these tokens in front", code="llmjax.adapters.prompt")
@bases
def test_a_prompt_of_real_embeddings_is_these_tokens(kind, evidence):
    """Begun from the vocabulary it is bitwise the same input: 1e-5, sums in another order."""
    model, params = adapted(BASES[kind], PromptTuning(count=3, tokens=tuple(FRONT.tolist())))
    evidence.record(relative(logits_of(model)(params), whole(BASES[kind], before(TOKENS))[:, 3:]), 1e-5)
    assert relative(logits_of(model)(params), whole(BASES[kind], TOKENS)) > 1e-2


@evidence("G26", oracle="the base with these tokens in front", code="llmjax.adapters.prompt")
def test_the_last_of_several_prompts_stands_first(evidence):
    """Each has rows of its own below the table: 1e-5, sums in another order."""
    one, two = PromptTuning("one", count=2, tokens=(7, 1)), PromptTuning("two", count=1, tokens=(3,))
    model, params = adapted(GPT2, one, two)
    evidence.record(relative(logits_of(model)(params), whole(GPT2, before(TOKENS))[:, 3:]), 1e-5)


@evidence("G25", oracle="the base with cached tokens in front", code="llmjax.adapters.prefix")
@bases
def test_a_prefix_of_cached_tokens_is_these_tokens(kind, evidence):
    """Keys and values, latents and states of recurrences that three tokens leave: 1e-5, sums in another order."""
    base = BASES[kind]
    model, params = adapted(base, PrefixTuning(count=3))
    started = logits_of(model)(params)
    params = {**params, "adapters": {"default": prefix_of(model.adapters[0], base, params_of(base), jnp.array(FRONT))}}
    wanted = whole(base, before(TOKENS))[:, 3:]
    evidence.record(relative(logits_of(model)(params), wanted), 1e-5)
    assert relative(started, wanted) > 1e-2


@evidence("G25", oracle="He et al. 2022: a mix of two softmaxes, in numpy", code="llmjax.adapters.prefix")
def test_prefix_is_a_gated_mix(evidence):
    """l Attn(P) + (1 - l) Attn(K, V), l = sigmoid(lse_P - lse_K), of the keys and values of the tokens alone."""
    base = dataclasses.replace(GPT2, layers=1)
    model, params = adapted(base, PrefixTuning(count=3))
    sites = model.build().apply({"params": params}, TOKENS, mutable=["sites"])[1]["sites"]["blocks"]["0"]["mixer"]
    q, k, v = (np.asarray(sites[name][0], np.float64) for name in "qkv")
    prefix = np.asarray(params["adapters"]["default"]["prefix"], np.float64).reshape(3, 2, 2, 4)

    def attention(keys, values, mask):
        scores = np.einsum("bqhd,bkhd->bhqk", q, keys) / 2 + np.where(mask, 0, -np.inf)
        sums = np.exp(scores).sum(-1)
        return np.einsum("bhqk,bkhd->bqhd", np.exp(scores) / sums[..., None], values), np.log(sums)

    each = [np.broadcast_to(prefix[:, i], (2, 3, 2, 4)) for i in range(2)]
    of_prefix, lse_p = attention(*each, np.ones((6, 3), bool))
    of_tokens, lse_k = attention(k, v, np.tril(np.ones((6, 6), bool)))
    share = np.moveaxis(1 / (1 + np.exp(lse_k - lse_p)), 1, 2)[..., None]
    evidence.record(np.abs(np.asarray(sites["z"][0]) - (share * of_prefix + (1 - share) * of_tokens)).max(), 2e-6)


@pytest.mark.parametrize("adapter", [PromptTuning(count=3), PrefixTuning(count=3)], ids=lambda a: type(a).__name__)
def test_padding_changes_nothing(adapter):
    """Rows of one document with padding behind it, as Padded data has them, by documents and by positions."""
    model, params = adapted(BASES["rotary and Mamba"], adapter)
    apply = jax.jit(lambda *inputs: model.build().apply({"params": params}, *inputs)[0])
    positions = np.array([[0, 1, 2, 3, -1, -1], [0, 1, 2, 3, 4, 5]], np.int32)
    segment_ids = np.where(positions < 0, -1, np.array([[4], [5]])).astype(np.int32)
    mine = apply(TOKENS, positions, segment_ids)
    assert mine.shape == (2, 6, 11)
    assert relative(mine[0, :4], apply(TOKENS)[0, :4]) < 2e-5
    assert relative(mine[1], apply(TOKENS)[1]) < 2e-5


DECODED = {
    "prompt": (GPT2, (PromptTuning(count=3),)),
    "p-tuning": (GPT2, (PTuning(count=3, hidden=5, encoder="lstm", depth=1),)),
    "prefix": (BASES["rotary and Mamba"], (PrefixTuning(count=3),)),
    "both": (GPT2, (PrefixTuning("prefix", count=2, hidden=4), PromptTuning("prompt", count=2))),
    "unipelt": (GPT2, unipelt(rank=2, count=3, size=3)),
    "others": (GPT2, (Bottleneck("a", size=3), Compacter("b", size=4, terms=2), Mixture("c", experts=2, active=1))),
}


@pytest.mark.parametrize("name", DECODED)
def test_generation_is_the_whole_pass(name):
    """Prompts of different lengths, greedily continued: the tokens and log-probabilities of one pass over each row."""
    base, adapters = DECODED[name]
    model, params = adapted(base, *adapters)
    params = shaken(model, params)
    prompts = [[1, 2, 3, 4, 5], [6, 7]]
    found = generate(Generate(temperature=0.0, max_tokens=4), model, params, prompts)
    apply = jax.jit(lambda params, tokens: model.build().apply({"params": params}, tokens)[0])
    for row, prompt in enumerate(prompts):
        tokens = np.array([[*prompt, *found.tokens[row]]], np.int32)
        logs = jax.nn.log_softmax(apply(params, tokens)[0, len(prompt) - 1 : -1])
        assert np.argmax(logs, -1).tolist() == found.tokens[row].tolist()
        np.testing.assert_allclose(np.max(logs, -1), found.model_log_probs[row], atol=1e-5)


@evidence("G27", oracle="counts of the notes, checked there with peft", code="llmjax.adapters.p_tuning")
@evidence("G26", oracle="counts of the notes, checked there with peft", code="llmjax.adapters.prompt")
@evidence("G25", oracle="counts of the notes, checked there with peft", code="llmjax.adapters.prefix")
def test_counts(evidence):
    """GPT-2 124M: 20 virtual tokens, 20 of a prefix without and with a network of 768, 10 written by networks."""
    small = gpt2("124M")
    counts = {
        15_360: PromptTuning(count=20),
        368_640: PrefixTuning(count=20),
        14_780_160: PrefixTuning(count=20, hidden=768),
        1_779_456: PTuning(count=10),
        27_166_464: PTuning(count=10, encoder="lstm"),
    }
    for wanted, adapter in counts.items():
        model = Adapted(base=small, adapters=(adapter,))
        evidence.record(abs(model.num_params() - small.num_params() - wanted), 0)


@evidence("G27", oracle="the prompt that the network wrote, alone", code="llmjax.adapters.p_tuning")
@evidence("G25", oracle="the prefix that the network wrote, alone", code="llmjax.adapters.prefix")
@pytest.mark.parametrize(
    "adapter",
    [PTuning(count=3, hidden=5), PTuning(count=3, hidden=5, encoder="lstm"), PrefixTuning(count=3, hidden=5)],
    ids=["mlp", "lstm", "prefix"],
)
def test_networks_are_dropped_after_training(adapter, evidence):
    """What is kept is the prompt or the prefix; the logits are the same to the bit."""
    model, params = adapted(GPT2, adapter)
    params = shaken(model, params)
    after, kept = folded(model, params)
    assert set(flat(kept)) == set(flat(after.abstract()))
    assert after.num_params() - GPT2.num_params() == (3 * 8 if isinstance(adapter, PTuning) else 3 * 2 * 2 * 8)
    evidence.record(relative(logits_of(after)(kept), logits_of(model)(params)), 1e-6)


@pytest.mark.parametrize("name", ["p-tuning", "both"])
def test_gradients_reach_all_of_it(name):
    """And nothing else."""
    base, adapters = DECODED[name]
    model, params = adapted(base, *adapters)
    trained, frozen = split(shaken(model, params), model.trains)
    gradients = flat(jax.grad(lambda x: jnp.sum(jnp.sin(logits_of(model)(merged(x, frozen)))))(trained))
    assert all("adapters/" in path for path in gradients)
    assert [path for path, g in gradients.items() if not np.any(np.asarray(g))] == []


def test_there_is_room_for_them():
    """Learned positions and the decode state count the virtual tokens."""
    model, _ = adapted(GPT2, PromptTuning("a", count=3), PrefixTuning("b", count=2))
    assert model.positions.length == 27
    assert model.init_state(2, 6, "float32")["positions"].shape == (2, 11)
    one = Data(packing=Padded(), tokenizer=Bytes())
    with pytest.raises(ConfigError, match="data.length.*exceeds the 27 learned positions"):
        validate(Experiment(model=model, data=one))
    with pytest.raises(ConfigError, match=r"data.packing.*use Padded\(\)"):
        validate(Experiment(model=model, data=dataclasses.replace(one, length=8, packing=FirstFit())))


def test_layers_that_adapters_do_not_find_are_refused():
    """In stages, and where inputs are reconstructed, layers run under other names."""
    model = Adapted(base=Decoder(vocab=300, layers=2), adapters=(PromptTuning(),))
    data = Data(packing=Padded(), tokenizer=Bytes(), length=8)
    with pytest.raises(ConfigError, match="mesh.stage.*adapters do not find them"):
        validate(Experiment(model=model, data=data, mesh=MeshConfig(stage=2)))


@pytest.mark.parametrize(
    ("base", "adapter", "words"),
    [
        (GPT2, PromptTuning(tokens=(11,)), "tokens.*outside 0 to 10"),
        (GPT2, PromptTuning(tokens=(1,), initial="normal"), "tokens.*initial=vocabulary"),
        (GPT2, PrefixTuning(count=0), "count.*at least 1"),
        (Encoder(vocab=11), PromptTuning(), "count.*a model that generates"),
        (Encoder(vocab=11), PrefixTuning(), "count.*a model that generates"),
        (Decoder(pattern=(Block(mixer=Mamba()),)), PrefixTuning(hidden=3), "hidden.*none of"),
        (Decoder(pattern=(Block(mixer=Mamba()),)), unipelt()[0], "count.*recurrence"),
        (Decoder(multi_token=MultiToken()), PrefixTuning(), "count.*multi_token=None"),
    ],
)
def test_what_does_not_fit_is_one_line(base, adapter, words):
    """Bad values name the field, what is wrong, and what would be right."""
    with pytest.raises(ConfigError, match=words) as caught:
        validate(Adapted(base=base, adapters=(adapter,)))
    assert "\n" not in str(caught.value)
