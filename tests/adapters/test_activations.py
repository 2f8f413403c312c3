"""Adapters that change activations: bottlenecks, Compacter, mixtures, gates, IA3 and chosen parameters of the base."""

import dataclasses
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.adapters import Adapted
from llmjax.adapters.bottleneck import Bottleneck
from llmjax.adapters.compacter import Compacter, kronecker_product
from llmjax.adapters.ia3 import IA3
from llmjax.adapters.lora import LoRA
from llmjax.adapters.mam import mam
from llmjax.adapters.mixture import Mixture
from llmjax.adapters.prefix import PrefixTuning
from llmjax.adapters.unipelt import Gated, unipelt
from llmjax.config import ConfigError, validate
from llmjax.models.gpt2 import gpt2
from llmjax.nn.attention import Attention
from llmjax.nn.block import Block
from llmjax.nn.decoder import Decoder
from llmjax.nn.mlp import MLP
from llmjax.nn.model import flat, merged, split, unflat
from llmjax.parallel.mesh import RULES
from tests.adapters.cases import MODELS, TOKENS, base_params, logits_of, shaken
from tests.evidence import evidence

pytestmark = pytest.mark.adapters

BASE = dataclasses.replace(MODELS["attention"], remat="none", unroll=1)
ONE = Decoder(
    vocab=11, d_model=8, layers=1, pattern=(Block(mixer=Attention(heads=2), mlp=MLP(d_ff=12, activation="relu")),)
)
"""One layer, so that its mixer reads the same with an adapter and without."""
METHODS = {
    "Houlsby": (Bottleneck(size=3),),
    "Pfeiffer": (Bottleneck(size=3, places=("mlp",)),),
    "parallel": (Bottleneck(size=3, parallel=True, scale=4.0),),
    "Compacter": (Compacter(size=4, terms=2),),
    "dense mixture": (Mixture(adapter=Bottleneck(size=2), experts=3),),
    "top mixture of LoRA": (Mixture(adapter=LoRA(rank=1, targets="qv"), experts=3, active=2),),
    "gated": (Gated(adapter=LoRA(rank=1, targets="/down$")),),
}


def relative(mine, theirs):
    """Largest difference over the largest value."""
    return float(np.abs(mine - theirs).max() / np.abs(theirs).max())


def adapted(*adapters, base=BASE):
    """A model with adapters, and its parameters away from their start."""
    model = Adapted(base=base, adapters=adapters)
    validate(model)
    return model, shaken(model, start(model))


@cache
def start(model):
    """An adapted model's parameters as they start."""
    return jax.jit(model.init)(jax.random.key(1), base_params(model.base))


def added(model, *adapters):
    """Parameters that adapters add to a model."""
    return Adapted(base=model, adapters=adapters).num_params() - model.num_params()


def changed(params, **values):
    """The parameters with every leaf of a name replaced by one that is full of a value."""
    return unflat({p: jnp.full_like(x, values.get(p.split("/")[-1], x)) for p, x in flat(params).items()})


@pytest.mark.parametrize("name", METHODS)
def test_it_starts_as_the_base_and_alone_trains(name):
    """Bitwise the base before training; afterwards every parameter of the method has a gradient and no other one."""
    model, params = adapted(*METHODS[name])
    begun, base = logits_of(model)(start(model)), logits_of(BASE)(base_params(BASE))
    # A mean of equal outputs has other last bits than one of them.
    assert relative(begun, base) <= (1e-6 if "mixture" in name else 0)
    assert relative(logits_of(model)(params), base) > 1e-3
    trained, frozen = split(params, model.trains)
    loss = lambda trained: jnp.sum(jnp.sin(logits_of(model)(merged(trained, frozen))))
    gradients = flat(jax.grad(loss)(trained))
    assert all("adapters/" in path for path in gradients)
    assert [path for path, g in gradients.items() if not np.any(np.asarray(g))] == []
    sizes, words = flat(model.abstract()), {word for word, _ in RULES} | {None}
    for path, names in flat(model.logical_axes()).items():
        assert len(names) <= len(sizes[path].shape)
        assert set(names) <= words


@evidence("G24", oracle="the paper's formula on captured activations, in numpy", code="llmjax.adapters.bottleneck")
def test_sequential_bottleneck(evidence):
    """After the mixer: m + B relu(A m + a) + b of the base's own m, with 2 r d + r + d parameters each."""
    model, params = adapted(Bottleneck(size=3, places=("mixer",), scale=0.5), base=ONE)
    read = lambda model, params: model.build().apply({"params": params}, TOKENS, mutable=["sites"])[1]["sites"]
    m = np.asarray(read(ONE, base_params(ONE))["blocks"]["0"]["mixer_out"][0])
    own = {name: np.asarray(x[0]) for name, x in params["blocks"]["0"]["mixer"]["adapters"]["default"].items()}
    wanted = m + 0.5 * (np.maximum(m @ own["down"] + own["down_bias"], 0) @ own["up"] + own["up_bias"])
    evidence.record(relative(read(model, params)["blocks"]["0"]["mixer_out"][0], wanted), 1e-6)
    small = gpt2("124M")
    evidence.record(abs(added(small, Bottleneck(size=16)) - 608_640), 0)  # 24 adapters of 25,360, biases counted
    evidence.record(abs(added(small, Bottleneck(size=16, places=("mlp",))) - 12 * 25_360), 0)


@evidence("G24", oracle="a wider feed-forward layer, its matrices concatenated", code="llmjax.adapters.bottleneck")
def test_parallel_bottleneck(evidence):
    """Beside an MLP with the same activation it is hidden units more: 1e-6, sums in another order."""
    model, params = adapted(Bottleneck(size=3, places=("mlp",), parallel=True, scale=4.0), base=ONE)
    params = changed(params, down_bias=0.0, up_bias=0.0)
    mlp = params["blocks"]["0"]["mlp"]
    own = mlp["adapters"]["default"]
    up = jnp.concatenate([mlp["up"]["kernel"], own["down"]], axis=-1)
    down = jnp.concatenate([mlp["down"]["kernel"], 4.0 * own["up"]], axis=-2)
    block = dataclasses.replace(ONE.pattern[0], mlp=MLP(d_ff=15, activation="relu"))
    wide = {**flat(base_params(ONE)), "blocks/0/mlp/up/kernel": up, "blocks/0/mlp/down/kernel": down}
    theirs = logits_of(dataclasses.replace(ONE, pattern=(block,)))(unflat(wide))
    evidence.record(relative(logits_of(model)(params), theirs), 1e-6)


@evidence("G23", oracle="jnp.kron written out, and a Bottleneck with these matrices", code="llmjax.adapters.compacter")
def test_compacter(evidence):
    """x sum_i kron(R_i, s_i t_i), the same model, and (d + r) weights for each matrix."""
    model, params = adapted(Compacter(size=4, terms=2, rank=2))
    rule = params["adapters"]["default"]["rule"]

    def matrix(own, side):
        return sum(jnp.kron(rule[i], own[f"{side}_s"][i] @ own[f"{side}_t"][i]) for i in range(2))

    leaves = flat(base_params(BASE))
    for place in ("mixer", "mlp"):
        own = params["blocks"]["0"][place]["adapters"]["default"]
        x = jnp.linspace(-1, 1, 24).reshape(3, 8)
        one = jax.tree.map(lambda a: a[0], own)
        mine = kronecker_product(x, rule, one["down_s"], one["down_t"])
        evidence.record(relative(mine, x @ matrix(one, "down")), 1e-6)
        written = {side: jax.vmap(lambda own, side=side: matrix(own, side))(own) for side in ("down", "up")}
        written |= {name: own[name] for name in ("down_bias", "up_bias")}
        leaves |= {f"blocks/0/{place}/adapters/default/{name}": x for name, x in written.items()}
    theirs = logits_of(Adapted(base=BASE, adapters=(Bottleneck(size=4),)))(unflat(leaves))
    evidence.record(relative(logits_of(model)(params), theirs), 1e-6)
    each = 4 * (768 + 48) - 768 - 48 + (768 + 48) - 2 * (768 + 48) + (768 + 48)  # two matrices and two biases
    evidence.record(abs(added(gpt2("124M"), Compacter(size=48)) - (24 * each + 64)), 0)


@evidence("G28", oracle="counts of the notes and of the paper", code="llmjax.adapters.ia3")
def test_counts_of_ia3(evidence):
    """GPT-2 124M: keys, values and feed-forward activations; with queries what peft's fused projection has."""
    evidence.record(abs(added(gpt2("124M"), IA3()) - 55_296), 0)
    evidence.record(abs(added(gpt2("124M"), IA3(targets="/(query|key|value|down)$")) - 64_512), 0)


@evidence("G28", oracle="the paper's rescaling of captured activations", code="llmjax.adapters.ia3")
def test_ia3_rescales_activations_of_gated_layers(evidence):
    """What `down` reads of a GLU is l * (f(gate) * up), and keys and values, bias and all, are l * k, l * v."""
    one = dataclasses.replace(BASE, layers=1)
    model, params = adapted(IA3(), base=one)
    read = lambda model, params: model.build().apply({"params": params}, TOKENS, mutable=["sites"])[1]["sites"]
    base, mine = (read(m, p)["blocks"]["0"]["mixer"] for m, p in ((one, base_params(one)), (model, params)))
    own = params["blocks"]["0"]
    # The value alone is not turned by its position.
    factor = own["mixer"]["value"]["adapters"]["default"]["factor"]
    evidence.record(relative(mine["v"][0], factor[0] * base["v"][0]), 1e-6)
    kernel = own["mlp"]["down"]["kernel"] * own["mlp"]["down"]["adapters"]["default"]["factor"][..., None]
    folded = flat(params) | {"blocks/0/mlp/down/kernel": kernel}
    folded["blocks/0/mlp/down/adapters/default/factor"] = jnp.ones((1, 12))
    evidence.record(relative(logits_of(model)(unflat(folded)), logits_of(model)(params)), 1e-6)


@evidence("G29", oracle="counts of the notes; the other leaves", code="llmjax.adapters.adapted")
def test_biases_and_norms_alone(evidence):
    """BitFit is `trained="bias$"`, tuning of norms `trained="norm/(scale|bias)$"`: nothing is added, all else stays."""
    small = gpt2("124M")
    for pattern, wanted in (("bias$", 102_144), (r"norm/(scale|bias)$", 25 * 2 * 768)):
        model = Adapted(base=small, trained=pattern)
        found = {path: x.size for path, x in flat(model.abstract()).items() if model.trains(path)}
        evidence.record(abs(sum(found.values()) - wanted), 0)
        assert model.num_params() == small.num_params()
        assert all(path.split("/")[-1] in ("bias", "scale") for path in found)
    model = Adapted(base=BASE, trained="bias$")
    params = start(model)
    trained, frozen = split(params, model.trains)
    loss = lambda trained: jnp.sum(jnp.sin(logits_of(model)(merged(trained, frozen))))
    stepped = flat(merged(jax.tree.map(lambda x, g: x - g, trained, jax.grad(loss)(trained)), frozen))
    differ = {path for path, x in flat(params).items() if not np.array_equal(x, stepped[path])}
    # Softmax does not change where all keys move by one vector; turned by positions they do not move by one.
    assert differ == {path for path in stepped if path.endswith("bias")}


@evidence("G32", oracle="each adapter alone", code="llmjax.adapters.mixture")
def test_mixture_of_adapters(evidence):
    """Weights sum to 1; the largest alone (one-hot) is that adapter at each token, another one at other tokens."""
    expert = Bottleneck(size=3, places=("mlp",))
    model, params = adapted(Mixture(adapter=expert, experts=3, active=1), base=ONE)
    own = params["blocks"]["0"]["mlp"]["adapters"]["default"]
    own["gate"] = own["gate"] * 100
    mine = logits_of(model)(params)
    single = Adapted(base=ONE, adapters=(expert,))
    place = "blocks/0/mlp/adapters/default"
    each = []
    for i in range(3):
        leaves = flat(base_params(ONE)) | {f"{place}/{name}": x for name, x in own[str(i)].items()}
        each.append(logits_of(single)(unflat(leaves)))
    sites = model.build().apply({"params": params}, TOKENS, mutable=["sites"])[1]["sites"]["blocks"]["0"]
    mid = np.asarray(sites["resid_mid"][0])
    normed = mid / np.sqrt((mid**2).mean(-1, keepdims=True) + 1e-6)
    chosen = np.argmax(normed @ own["gate"][0], axis=-1)
    assert len(np.unique(chosen)) > 1
    wanted = np.take_along_axis(np.stack(each), chosen[None, ..., None], axis=0)[0]
    evidence.record(relative(mine, wanted), 1e-6)
    dense = dataclasses.replace(model, adapters=(Mixture(adapter=expert, experts=3),))
    for i in range(3):
        own[str(i)] = own["0"]
    evidence.record(relative(logits_of(dense)(params), each[0]), 1e-6)


@evidence("G30", oracle="the base, and each of its methods without a gate", code="llmjax.adapters.unipelt")
def test_gates_of_unipelt(evidence):
    """All gates closed is the base, one of them open that method alone: 1e-6, y + 1 (f - y) rounds twice."""
    gated = unipelt(rank=2, count=3, size=3)
    model, params = adapted(*gated, base=ONE)
    closed = changed(params, u=0.0, c=-1e4)
    evidence.record(relative(logits_of(model)(closed), logits_of(ONE)(base_params(ONE))), 1e-6)
    alone = {
        "prefix": PrefixTuning("prefix", count=3),
        "lora": LoRA("lora", rank=2, targets="qv"),
        "adapter": Bottleneck("adapter", size=3, places=("mlp",)),
    }
    for name, adapter in alone.items():
        gate = lambda p, name=name: f"{name}/" in p and p.endswith("/c")
        opened = {p: jnp.full_like(x, 1e4) if gate(p) else x for p, x in flat(closed).items()}
        own = {p.replace(f"{name}/of/", f"{name}/"): x for p, x in flat(params).items()}
        theirs = Adapted(base=ONE, adapters=(adapter,))
        there = flat(theirs.abstract())
        own = {p: x for p, x in own.items() if p in there}
        evidence.record(relative(logits_of(model)(unflat(opened)), logits_of(theirs)(unflat(own))), 1e-6)


@evidence("G31", oracle="a prefix on a model whose feed-forward layer is wider", code="llmjax.adapters.mam")
def test_mam_is_its_parts(evidence):
    """The parallel adapter folded into the MLP as hidden units leaves prefix tuning: 1e-6, sums in another order."""
    model, params = adapted(*mam(count=3, size=3, scale=4.0), base=ONE)
    params = changed(params, down_bias=0.0, up_bias=0.0)
    mlp = params["blocks"]["0"]["mlp"]
    own = mlp["adapters"]["adapter"]
    leaves = {path: x for path, x in flat(params).items() if "adapters/adapter/" not in path}
    leaves["blocks/0/mlp/up/kernel"] = jnp.concatenate([mlp["up"]["kernel"], own["down"]], axis=-1)
    leaves["blocks/0/mlp/down/kernel"] = jnp.concatenate([mlp["down"]["kernel"], 4.0 * own["up"]], axis=-2)
    block = dataclasses.replace(ONE.pattern[0], mlp=MLP(d_ff=15, activation="relu"))
    wide = Adapted(base=dataclasses.replace(ONE, pattern=(block,)), adapters=model.adapters[:1])
    evidence.record(relative(logits_of(model)(params), logits_of(wide)(unflat(leaves))), 1e-6)


@pytest.mark.parametrize(
    ("adapter", "words"),
    [
        (Bottleneck(size=0), "size.*at least 1"),
        (Bottleneck(places=()), "places.*name at least one"),
        (Compacter(size=6, terms=4), "terms.*size=6"),
        (Compacter(size=6, terms=3), "terms.*d_model=8"),
        (Mixture(experts=2, active=3), "active.*from 1 to experts=2"),
        (Mixture(adapter=PrefixTuning()), "adapter.*before the first token"),
        (Gated(adapter=LoRA(targets="nothing")), "adapter.targets.*matches no projection"),
    ],
)
def test_what_does_not_fit_is_one_line(adapter, words):
    """Bad values name the field, what is wrong, and what would be right."""
    with pytest.raises(ConfigError, match=words) as caught:
        validate(Adapted(base=BASE, adapters=(adapter,)))
    assert "\n" not in str(caught.value)
