"""What every method that changes weight matrices keeps to, on attention, state-space and expert layers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.adapters import Adapted, LoRA
from llmjax.nn.model import flat, merged, split, unflat
from llmjax.nn.projections import Projection, projections
from llmjax.parallel.mesh import RULES
from tests.adapters.cases import METHODS, MODELS, TOKENS, adapted_params, base_params, logits_of, shaken, small
from tests.evidence import evidence

every = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "LoRA" else pytest.mark.adapters) for name in METHODS]
)
# On the second model most methods differ in nothing but their own formula: LoRA is there in the quick suite.
both = pytest.mark.parametrize(
    ("name", "kind"),
    [
        pytest.param(name, kind, marks=[] if name == "LoRA" else pytest.mark.adapters)
        for name in METHODS
        for kind in MODELS
    ],
)
WORDS = {name for name, _ in RULES} | {None}


def adapted(name, kind):
    """A small model with one method on all its linear layers."""
    return Adapted(base=MODELS[kind], adapters=(small(name),))


def relative(mine, theirs):
    """Largest difference over the largest value."""
    return float(np.abs(mine - theirs).max() / np.abs(theirs).max())


@both
def test_it_starts_as_the_base_and_leaves_it_alone(name, kind):
    """Nothing changes before training; the base's parameters are those it was given, but for a share moved out."""
    model = adapted(name, kind)
    params = adapted_params(model)
    ours, base = logits_of(model)(params), logits_of(model.base)(base_params(model.base))
    frozen = flat(split(params, model.trains)[1])
    moved = [path for path, x in flat(base_params(model.base)).items() if not np.array_equal(x, frozen[path])]
    # A method that moves a part of W into its factors, or divides by a norm and multiplies by it, rounds twice.
    assert relative(ours, base) <= (5e-6 if moved or small(name).rounds else 0)


@both
def test_the_product_is_that_of_the_matrix(name, kind):
    """The base with W' in W's place computes the same: 1e-5, sums in another order."""
    model = adapted(name, kind)
    params = shaken(model, adapted_params(model))
    assert relative(logits_of(model.base)(folded(model, params)), logits_of(model)(params)) < 1e-5
    assert relative(logits_of(model.base)(base_params(model.base)), logits_of(model)(params)) > 1e-3


def folded(model, params):
    """The base's parameters, each matrix replaced by what the method says stands for it."""
    adapter, leaves, base = model.adapters[0], flat(params), flat(base_params(model.base))
    shared = params.get("adapters", {}).get(adapter.name)
    result = {path: leaves[path] for path in base}
    for path, p in adapter.found(model.base).items():
        own = {k.rpartition("/")[2]: x for k, x in leaves.items() if k.startswith(f"{path}/adapters/")}
        steps = {"kernel": adapter.weight, "bias": adapter.bias}
        for leaf in ("kernel", "bias") if p.bias else ("kernel",):
            step = lambda own, x, p=p, change=steps[leaf]: change(own, x, p, shared)
            for _ in range(1 + (p.experts is not None)):
                step = jax.vmap(step)
            result[f"{path}/{leaf}"] = step(own, leaves[f"{path}/{leaf}"])
    return unflat(result)


@every
def test_only_it_trains_and_all_of_it(name):
    """What trains is the method's own, and from no symmetric point every one of its parameters has a gradient."""
    model = adapted(name, "attention")
    params = shaken(model, adapted_params(model))
    trained, frozen = split(params, model.trains)
    assert all("adapters/" in path for path in flat(trained))
    loss = lambda trained: jnp.sum(jnp.sin(logits_of(model)(merged(trained, frozen))))
    gradients = flat(jax.grad(loss)(trained))
    assert [path for path, g in gradients.items() if not np.any(np.asarray(g))] == []


@every
def test_axes_have_names_that_the_mesh_knows(name):
    """Every parameter of the method carries a logical name for each axis."""
    model = adapted(name, "mamba and experts")
    sizes = flat(model.abstract())
    for path, names in flat(model.logical_axes()).items():
        assert len(names) <= len(sizes[path].shape)
        assert set(names) <= WORDS


@every
@pytest.mark.parametrize("axes", [("rank", "heads"), ("d_model", "rank")], ids="-".join)
def test_a_matrix_may_have_an_axis_named_rank(name, axes):
    """As projections of low rank do: no parameter carries a name twice, which no mesh could split."""
    matrix = Projection((4,), (6,), axes)
    start = lambda key, kernel: small(name).start(key, matrix, kernel)
    for box in jax.eval_shape(start, jax.random.key(0), jnp.zeros((4, 6))).values():
        words = [word for word in box.names if word is not None]
        assert len(words) == len(set(words))


@every
def test_token_by_token_equals_the_whole(name):
    """Decoding with a cache gives the logits of the whole pass: 1e-5, sums in another order."""
    model = adapted(name, "attention")
    params = shaken(model, adapted_params(model))
    module = model.build()
    step = jax.jit(lambda state, token: module.apply({"params": params}, token, state=state))
    state, found = model.init_state(2, 6, "float32"), []
    for t in range(6):
        logits, state = step(state, TOKENS[:, t : t + 1])
        found.append(logits)
    assert relative(jnp.concatenate(found, 1), logits_of(model)(params)) < 1e-5


@evidence("G07", oracle="one call for each adapter, on its rows", code="llmjax.adapters.adapted")
@every
def test_rows_have_adapters_of_their_own(name, evidence):
    """A batch whose rows have different adapters, or none, is the rows of separate batches: 1e-5, other sums."""
    model = Adapted(base=MODELS["attention"], adapters=(small(name), small(name, name="other")))
    params = shaken(model, adapted_params(model))
    apply = jax.jit(lambda params, rows: model.build().apply({"params": params}, TOKENS, rows=rows)[0])
    wanted = [logits_of(adapted(name, "attention"))(alone(params, adapter.name)) for adapter in model.adapters]
    wanted.append(logits_of(model.base)(without_adapters(params)))
    for rows in ([1, 0], [-1, 1]):
        for mine, row, number in zip(apply(params, jnp.array(rows)), (0, 1), rows, strict=True):
            evidence.record(relative(mine, wanted[number][row]), 1e-5)


def alone(params, name):
    """The parameters with one adapter, by the name that it has where there is no other."""
    prefix = f"adapters/{name}/"
    own = {path.replace(prefix, "adapters/default/"): x for path, x in flat(params).items() if prefix in path}
    return merged(without_adapters(params), unflat(own))


def without_adapters(params):
    """The base's parameters as they are now."""
    return split(params, lambda path: "adapters/" not in path)[0]


@evidence("G06", oracle="models built with one adapter each", code="llmjax.adapters.adapted")
def test_named_adapters_are_switched(evidence):
    """With several in the tree, those that are on count and in their order; the others might not be there."""
    both = Adapted(base=MODELS["attention"], adapters=(LoRA(name="one", rank=2), LoRA(name="two", rank=3)))
    params = shaken(both, adapted_params(both))
    for name, adapter in zip(("one", "two"), both.adapters, strict=True):
        alone = Adapted(base=both.base, adapters=(adapter,))
        own = {path: x for path, x in flat(params).items() if "adapters/" not in path or f"adapters/{name}/" in path}
        switched = dataclasses.replace(both, active=(name,))
        evidence.record(relative(logits_of(switched)(params), logits_of(alone)(unflat(own))), 0)
    off = dataclasses.replace(both, active=())
    evidence.record(relative(logits_of(off)(params), logits_of(both.base)(base_params(both.base))), 0)


def test_every_projection_is_listed_with_its_axes():
    """The kernels of the tree are those of the list, of the shapes that it says."""
    for model in MODELS.values():
        leaves, found = flat(model.abstract()), projections(model)
        kernels = {path for path in leaves if path.endswith("/kernel")} | {"embed/embedding"}
        wanted = {f"{path}/{p.leaf}" for path, p in found.items()}
        assert wanted <= kernels
        assert {path.split("/")[-2] for path in kernels - wanted} <= {"router", "conv"}
        for path, p in found.items():
            lead = (2,) * path.startswith("blocks/") + (() if p.experts is None else (p.experts,))
            assert leaves[f"{path}/{p.leaf}"].shape == lead + p.inputs + p.outputs
            assert len(p.axes) == len(p.inputs + p.outputs)
