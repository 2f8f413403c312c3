"""The plan of decoding: one token a row with a full cache, or a prompt that fills the cache (prefill).

The program is that of `llmjax.decode.generate`, greedy: parameters in the compute dtype, split as in training, and a
cache of `data.batch_size` rows of `data.length` tokens whose rows are split like the batch's, its heads like heads.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Int

from llmjax.config import InputError
from llmjax.decode.generate import laid_out
from llmjax.experiment import Experiment
from llmjax.nn.decoder import Decoder
from llmjax.nn.model import Model, Params, readout
from llmjax.parallel.fitting import held
from llmjax.parallel.mesh import Names, fit, placed, shardings
from llmjax.plan.decode_bound import decode_bound
from llmjax.plan.planner import described
from llmjax.plan.program import Program, attempt, devices_of
from llmjax.plan.target import Target
from llmjax.train.state import path_of

DecodeStep = Literal["decode", "prefill"]


def make(experiment: Experiment, target: Target, step: DecodeStep) -> dict[str, Any]:
    """Compile the step and count, as `llmjax.plan.planner.make` does of training.

    `bound` is `decode_bound` for what a chip holds and does. Raises InputError for a model that is no Decoder, a
    mesh that does not fit the target, or a target that the compiler does not know.
    """
    model, rows, length = experiment.model, experiment.data.batch_size, experiment.data.length
    if not isinstance(model, Decoder):
        raise InputError(f"--step={step}: model is a {type(model).__name__}, only a Decoder's is planned: use train")
    tokens = 1 if step == "decode" else length
    program = compile_decode(experiment, model, target, tokens)
    flops = forward_flops(model, length, tokens)
    found = described(program, target, rows * tokens, rows * flops)
    found |= {"step": step, "num_params": model.num_params(), "rows": rows, "cache_length": length, "advice": []}
    if step == "decode" and found["step_seconds"] and target.chip is not None:
        weights, cache = program.resident["parameters"], program.resident["cache"] / rows
        bound = decode_bound(target.chip, weights, cache, flops / found["devices"], rows)
        found["bound"] = bound._asdict()
    return found


def forward_flops(model: Decoder, length: int, tokens: int) -> float:
    """FLOPs of the last `tokens` of a row of `length`: the head's for one of them, the mixing's for what they see."""
    head = (model.flops_per_token(length) - 6 * model.matmul_params() - 3 * model.mixing_flops(length)) / 3
    before = length - tokens
    mixing = length * model.mixing_flops(length) - (before * model.mixing_flops(before) if before else 0.0)
    return 2 * tokens * model.matmul_params() + mixing + head


def compile_decode(experiment: Experiment, decoder: Decoder, target: Target, tokens: int) -> Program:
    """Compile a step of so many tokens a row; raises InputError where the mesh or the target cannot be had."""
    devices, data = devices_of(target), experiment.data
    mesh = experiment.mesh.build(devices)
    model, _ = laid_out(decoder, {"blocks": {}})  # as generation has its layers; their shapes come below
    with experiment.mesh.in_force():
        state = placed_state(model, data.batch_size, data.length, experiment.generate.cache_dtype, mesh)
        params = placed_params(model, experiment.train.precision.compute, mesh)
        ids = struct(jax.ShapeDtypeStruct((data.batch_size, tokens), jnp.int32), ("batch", None), mesh)
        resident = {"parameters": held(params), "cache": held(state)}
        split = jax.tree.map(lambda leaf: leaf.sharding, state)
        result = struct(jax.ShapeDtypeStruct((data.batch_size,), jnp.int32), ("batch",), mesh).sharding
        step = jax.jit(next_of(model), donate_argnums=1, out_shardings=(result, split))

        def compiled() -> Any:
            with jax.set_mesh(mesh):
                return step.lower(params, state, ids, ids).compile()

        return attempt(compiled, resident, mesh, len(devices))


def next_of(model: Model) -> Any:
    """(parameters, cache, tokens and positions `[batch, length]`) -> the most probable next tokens, and the cache."""
    module = model.build()

    def step(
        params: Params, state: Any, tokens: Int[Array, "batch length"], positions: Int[Array, "batch length"]
    ) -> tuple[Int[Array, " batch"], Any]:
        features, state = module.apply({"params": params}, tokens, positions, state=state, method="features")
        logits = readout(features.replace(hidden=features.hidden[:, -1:]))[:, 0]
        return jnp.argmax(logits, -1).astype(jnp.int32), state

    return step


def placed_params(model: Model, dtype: str, mesh: Mesh) -> Params:
    """Abstract parameters in the dtype that computes, split as in training."""
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), model.abstract())
    split = shardings(model.logical_axes(), shapes, mesh)
    return jax.tree.map(lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s), shapes, split)


def placed_state(model: Model, rows: int, length: int, dtype: str, mesh: Mesh) -> Any:
    """The abstract cache: its rows split like the batch's, the heads of keys and values like heads."""

    def place(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        *place_in, name = path_of(path).split("/")
        names: Names = ("batch",) if place_in == [] else (None, "batch")
        heads = name in ("key", "value") and leaf.ndim == 5
        names += (None, "kv_heads", None) if heads else (None,) * (leaf.ndim - len(names))
        return struct(leaf, names[: leaf.ndim], mesh)

    state = jax.eval_shape(lambda: model.init_state(rows, length, dtype))
    return jax.tree_util.tree_map_with_path(place, state)


def struct(leaf: jax.ShapeDtypeStruct, names: Names, mesh: Mesh) -> jax.ShapeDtypeStruct:
    """The shape of an array with its axes split as the table says of `names`."""
    sharding = NamedSharding(mesh, fit(placed(names), leaf.shape, mesh))
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
