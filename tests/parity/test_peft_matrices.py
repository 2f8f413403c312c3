"""Methods that change matrices beside peft, live: logits of the same weights, starts, importances, sums of vectors."""

import functools
import math
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from peft.optimizers import create_loraplus_optimizer
from peft.tuners.adalora.layer import RankAllocator
from peft.tuners.lokr.layer import factorization
from peft.utils import merge_utils

from llmjax.adapters import Adapted, LoRA
from llmjax.adapters.adalora import AdaLoRA
from llmjax.adapters.arithmetic import ties, weighted_sum
from llmjax.adapters.dora import DoRA
from llmjax.adapters.loha import LoHa
from llmjax.adapters.lokr import LoKr, split
from llmjax.adapters.merge import merge
from llmjax.adapters.oft import OFT
from llmjax.adapters.olora import OLoRA
from llmjax.adapters.pissa import PiSSA
from llmjax.adapters.vera import VeRA
from llmjax.models import hf
from llmjax.nn.model import flat, unflat
from llmjax.train.optimizers.base import set_learning_rate
from llmjax.train.optimizers.lora_plus import lora_plus
from llmjax.train.optimizers.rank_budget import RankBudgetAdamW
from llmjax.train.optimizers.sgd import SGD
from scripts.golden_models import LLAMA, inputs, random_model
from tests.evidence import evidence
from tests.models.golden import logits, relative_error

pytestmark = pytest.mark.parity

TOLERANCE = 1e-5
"""Float32 sums of tens of terms in another order, two layers."""
MODULES = {
    "query": "self_attn.q_proj",
    "value": "self_attn.v_proj",
    "out": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "down": "mlp.down_proj",
}
TARGETS = "/(query|value|out|gate|down)$"
THEIRS = {"target_modules": [name.split(".")[1] for name in MODULES.values()]}


def place(leaf):
    """Our path of a projection."""
    return f"blocks/0/{'mixer' if leaf in ('query', 'value', 'out') else 'mlp'}/{leaf}"


@functools.cache
def base(folder):
    """Our config and parameters of the tiny LLaMA."""
    random_model(LLAMA, seed=5).save_pretrained(folder)
    return hf.load_hf(folder)


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    """Config and parameters of the base."""
    torch.set_num_threads(1)
    return base(tmp_path_factory.mktemp("llama"))


def theirs_with(config, shake=0.3):
    """peft's model, noise added to what trains."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(random_model(LLAMA, seed=5), config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(shake * torch.randn_like(parameter))
    return model


def their_logits(model):
    """Logits of the tokens, and the tokens."""
    tokens, _ = inputs(LLAMA.vocab_size, seed=5)
    with torch.no_grad():
        return model(input_ids=tokens).logits.numpy(), tokens.numpy()


def modules(model, leaf):
    """The tuned modules of both layers that are our projection."""
    found = dict(model.named_modules())
    return [found[f"base_model.model.model.layers.{i}.{MODULES[leaf]}"] for i in range(2)]


def stacked(tensors, shape):
    """Tensors of the layers as one array of ours."""
    return jnp.asarray(np.stack([x.detach().numpy().reshape(shape) for x in tensors]))


def adapted(ours, adapter, model, parts, shared=None):
    """The base with an adapter whose parameters are what `parts(module)` reads off peft's modules: torch tensors."""
    config, params = ours
    whole = Adapted(base=config, adapters=(adapter,))
    shapes = flat(whole.abstract())
    leaves = dict(flat(params))
    for leaf in MODULES:
        found = [parts(module) for module in modules(model, leaf)]
        for name in found[0]:
            path = f"{place(leaf)}/adapters/default/{name}"
            leaves[path] = stacked([x[name] for x in found], shapes[path].shape[1:])
    leaves |= {f"adapters/default/{name}": jnp.asarray(x.detach().numpy()) for name, x in (shared or {}).items()}
    assert leaves.keys() == shapes.keys()
    return whole, unflat(leaves)


def low_rank(module):
    """A and B as ours: inputs by rank, rank by outputs."""
    return {"a": module.lora_A["default"].weight.T, "b": module.lora_B["default"].weight.T}


def lora_config(**changes):
    """peft's LoraConfig of rank 3 on our targets."""
    return peft.LoraConfig(**({"r": 3, "lora_alpha": 5, **THEIRS} | changes))


def lokr_parts(module):
    """C, and D or its factors."""
    whole = {"c": module.lokr_w1["default"].T}
    if "default" in module.lokr_w2:
        return whole | {"d": module.lokr_w2["default"].T}
    return whole | {"a": module.lokr_w2_b["default"].T, "b": module.lokr_w2_a["default"].T}


def loha_parts(module):
    """The four factors."""
    found = {f"a{i}": getattr(module, f"hada_w{i}_b")["default"].T for i in (1, 2)}
    return found | {f"b{i}": getattr(module, f"hada_w{i}_a")["default"].T for i in (1, 2)}


CASES = {
    "lora": (LoRA(rank=3, alpha=5.0), lora_config(), low_rank, "G09 llmjax.adapters.lora"),
    "rslora": (
        LoRA(rank=3, alpha=5.0, stabilised=True),
        lora_config(use_rslora=True),
        low_rank,
        "G09 llmjax.adapters.lora",
    ),
    "dora": (
        DoRA(rank=3, alpha=5.0),
        lora_config(use_dora=True),
        lambda m: low_rank(m) | {"magnitude": m.lora_magnitude_vector["default"].weight},
        "G11 llmjax.adapters.dora",
    ),
    # peft divides by rank + 1e-5.
    "adalora": (
        AdaLoRA(rank=3, alpha=5.0 * 3 / (3 + 1e-5)),
        peft.AdaLoraConfig(init_r=3, lora_alpha=5, total_step=10, **THEIRS),
        lambda m: {
            "a": m.lora_A["default"].T,
            "b": m.lora_B["default"].T,
            "singular": m.lora_E["default"].reshape(-1),
        },
        "G12 llmjax.adapters.adalora",
    ),
    "loha": (LoHa(rank=3, alpha=5.0), peft.LoHaConfig(r=3, alpha=5, **THEIRS), loha_parts, None),
    "lokr": (LoKr(rank=2, alpha=5.0), peft.LoKrConfig(r=2, alpha=5, **THEIRS), lokr_parts, "G22 llmjax.adapters.lokr"),
    "lokr whole": (
        LoKr(rank=8, alpha=5.0),
        peft.LoKrConfig(r=8, alpha=5, **THEIRS),
        lokr_parts,
        "G22 llmjax.adapters.lokr",
    ),
    "lokr factor": (
        LoKr(rank=2, alpha=5.0, factor=4),
        peft.LoKrConfig(r=2, alpha=5, decompose_factor=4, **THEIRS),
        lokr_parts,
        "G22 llmjax.adapters.lokr",
    ),
    "oft series": (
        OFT(block=4, terms=5),
        peft.OFTConfig(oft_block_size=4, r=0, use_cayley_neumann=True, **THEIRS),
        lambda m: {"skew": m.oft_R["default"].weight},
        None,
    ),
    # Their exact form is the inverse turn of their series: Q has the other sign.
    "oft exact": (
        OFT(block=4),
        peft.OFTConfig(oft_block_size=4, r=0, use_cayley_neumann=False, **THEIRS),
        lambda m: {"skew": -m.oft_R["default"].weight},
        None,
    ),
}


def case(name):
    """A case with its mark."""
    row, code = CASES[name][3].split()
    mark = evidence(row, oracle=f"peft {peft.__version__} {type(CASES[name][1]).__name__}", code=code)
    return pytest.param(name, id=name, marks=mark)


@pytest.mark.parametrize("name", [case(name) for name in CASES if CASES[name][3]])
def test_logits(name, ours, evidence):
    """The same logits with the same weights, by the adapter and merged."""
    evidence.record(worst(name, ours), TOLERANCE)


@pytest.mark.parametrize("name", [name for name in CASES if not CASES[name][3]])
def test_logits_of_methods_without_a_row(name, ours):
    """The same."""
    assert worst(name, ours) < TOLERANCE


def worst(name, ours):
    """The larger error of the logits, by the adapter and merged."""
    adapter, config, parts, _ = CASES[name]
    model = theirs_with(config)
    whole, params = adapted(ours, set_targets(adapter), model, parts)
    theirs, tokens = their_logits(model)
    errors = [relative_error(logits(whole, params, tokens), theirs)]
    errors.append(relative_error(logits(ours[0], merge(whole, params)[0], tokens), theirs))
    assert relative_error(logits(*ours, tokens), theirs) > 1e-2
    return max(errors)


def set_targets(adapter):
    """The adapter on the projections of the test."""
    return type(adapter)(**{**vars(adapter), "targets": TARGETS})


def test_vera(ours):
    """The same logits with peft's shared matrices, of which each projection takes a part."""
    model = theirs_with(peft.VeraConfig(r=5, **THEIRS))
    one = modules(model, "gate")[0]
    shared = {"a": one.vera_A["default"].T, "b": one.vera_B["default"].T}
    parts = lambda m: {"lambda_d": m.vera_lambda_d["default"], "lambda_b": m.vera_lambda_b["default"]}
    whole, params = adapted(ours, VeRA(rank=5, targets=TARGETS), model, parts, shared)
    theirs, tokens = their_logits(model)
    assert relative_error(logits(whole, params, tokens), theirs) < TOLERANCE
    trained = sum(x.size for path, x in flat(whole.abstract()).items() if whole.trains(path))
    assert trained == sum(x.numel() for x in model.parameters() if x.requires_grad)


@pytest.mark.parametrize(("method", "start"), [(PiSSA, "pissa"), (OLoRA, "olora")])
def test_what_moves_out_of_the_matrix(method, start, ours):
    """A B and the rest of W are peft's to 1e-5 (the signs of singular vectors are free), and so are the logits."""
    model = theirs_with(lora_config(init_lora_weights=start), shake=0.0)
    whole = Adapted(base=ours[0], adapters=(method(rank=3, alpha=5.0, targets=TARGETS),))
    mine = flat(whole.init(jax.random.key(0), ours[1]))
    for leaf in MODULES:
        for i, module in enumerate(modules(model, leaf)):
            rest = module.base_layer.weight.detach().numpy().T
            product = (low_rank(module)["a"] @ low_rank(module)["b"]).detach().numpy()
            a, b = (mine[f"{place(leaf)}/adapters/default/{x}"][i] for x in "ab")
            assert relative_error(a.reshape(-1, 3) @ b.reshape(3, -1), product) < TOLERANCE
            assert relative_error(mine[f"{place(leaf)}/kernel"][i].reshape(rest.shape), rest) < TOLERANCE
    theirs, tokens = their_logits(model)
    assert relative_error(logits(whole, unflat(mine), tokens), theirs) < TOLERANCE


@evidence("G12", oracle=f"peft {peft.__version__} RankAllocator", code="llmjax.train.optimizers.rank_budget")
def test_importances_and_cuts(evidence):
    """Over 30 steps of random gradients the values that stay are those that peft's allocator leaves."""
    config = peft.AdaLoraConfig(
        init_r=3, target_r=1, tinit=5, tfinal=8, deltaT=3, total_step=30, lora_alpha=5, beta1=0.8, beta2=0.7, **THEIRS
    )
    model = theirs_with(config)
    allocator = RankAllocator(model.base_model.model, config, "default")
    names = {n: p for n, p in model.base_model.model.named_parameters() if ".lora_" in n}
    tree = {n: jnp.asarray(p.detach().numpy()) for n, p in names.items()}

    def nest(values):
        """Theirs by our names: singular values, P and Q of each module."""
        found = {}
        for n, x in values.items():
            module, kind = n.split(".lora_")
            at = module.replace(".", "_") + "/adapters/default/" + {"A": "a", "B": "b", "E": "singular"}[kind[0]]
            found[at] = {"A": lambda x: x.T, "B": lambda x: x.T, "E": lambda x: x.reshape(-1)}[kind[0]](x)
        return unflat(found)

    optimizer = RankBudgetAdamW(
        rank=1.0, start=5, until=22, every=3, sensitivity=0.8, uncertainty=0.7, weight_decay=0.0, clip=None
    )
    optimizer = optimizer.build(nest(tree))
    params, state, update = nest(tree), optimizer.init(nest(tree)), jax.jit(optimizer.update)
    random = np.random.default_rng(0)
    for t in range(1, 31):
        gradients = {n: random.normal(size=p.shape).astype(np.float32) for n, p in names.items()}
        # Theirs sees the same weights: those before the update, which it then cuts.
        for n, p in names.items():
            p.data = torch.from_numpy(np.array(tree[n]))
            p.grad = torch.from_numpy(gradients[n])
        _, pattern = allocator.update_and_allocate(model.base_model.model, t)
        updates, state = update(nest({n: jnp.asarray(g) for n, g in gradients.items()}), state, params)
        if pattern:
            kept = {n: np.asarray(mask) for n, mask in pattern.items()}
            after = flat(jax.tree.map(jnp.add, params, updates))
            for n, mask in kept.items():
                mine = np.asarray(after[n.split(".lora_")[0].replace(".", "_") + "/adapters/default/singular"]) != 0
                evidence.record(float(np.sum(mine != mask)), 0)
        else:  # the learning rate is zero: what changes is cut
            evidence.record(float(sum(np.sum(np.asarray(x) != 0) for x in flat(updates).values())), 0)


@evidence(
    "G10", oracle=f"peft {peft.__version__} create_loraplus_optimizer, SGD", code="llmjax.train.optimizers.lora_plus"
)
def test_lora_plus_moves_as_theirs(ours, evidence):
    """One step of SGD from the same gradients: 1e-6, one product."""
    model = theirs_with(lora_config())
    optimizer = create_loraplus_optimizer(model, torch.optim.SGD, lr=0.1, loraplus_lr_ratio=16.0)
    params = adapted(ours, LoRA(rank=3, alpha=5.0, targets=TARGETS), model, low_rank)[1]
    trained = unflat({path: x for path, x in flat(params).items() if "adapters/" in path})
    before = flat(trained)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    mine = SGD(groups=(lora_plus(),), weight_decay=0.0, clip=None).build(trained)
    state = set_learning_rate(mine.init(trained), 0.1)
    moved = flat(mine.update(jax.tree.map(jnp.ones_like, trained), state, trained)[0])
    after = flat(adapted(ours, LoRA(rank=3, alpha=5.0, targets=TARGETS), model, low_rank)[1])
    for path, x in moved.items():
        evidence.record(relative_error(before[path] + x, after[path]), 1e-6)


@evidence("G39", oracle=f"peft {peft.__version__} merge_utils", code="llmjax.adapters.arithmetic")
def test_sums_of_vectors(evidence):
    """Weighted sums and TIES of three vectors: 1e-6, sums of three."""
    random = np.random.default_rng(0)
    vectors, weights = [random.normal(size=(7, 9)).astype(np.float32) for _ in range(3)], [0.5, 1.5, -0.25]
    tensors, torch_weights = [torch.from_numpy(x) for x in vectors], torch.tensor(weights)
    theirs = merge_utils.task_arithmetic(tensors, torch_weights).numpy()
    evidence.record(relative_error(weighted_sum(list(map(jnp.asarray, vectors)), weights), theirs), 1e-6)
    for density in (0.2, 0.5):
        theirs = merge_utils.ties(tensors, torch_weights, density).numpy()
        evidence.record(relative_error(ties(list(map(jnp.asarray, vectors)), weights, density), theirs), 1e-6)


def test_sides_of_kronecker_products():
    """The same two divisors for every size and factor."""
    for size in range(1, 200):
        for factor in (-1, 2, 4, 6, 10):
            assert math.prod(split(size, factor)) == size
            assert split(size, factor) == factorization(size, factor)
