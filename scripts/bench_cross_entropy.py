"""Linear head and cross-entropy, value and gradients: ours chunked beside full-logits XLA and tokamax, in turn.

One head: hidden [tokens, width] and kernel [width, vocabulary] in `--dtype`, the mean loss and its gradients in both.
A round runs every side once; sides take turns in an order that rotates, and the figures are medians over the rounds.
Full logits are float32; a 16-bit head is also measured with rounded logits, and with ours taking all tokens at once.
TFLOP/s counts the three matrix products that the loss needs, 6 tokens x width x vocabulary, for every side alike: a
side that makes logits twice is slower for it. tokamax is left out where it is not installed. The table of speeds as
parts of the full-logits speed is printed last; `--json FILE` keeps everything.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels import linear_cross_entropy

Loss = Callable[[Array, Array, Array], Array]
CPU_SIZES = ["4096x32768x512"]
GPU_SIZES = ["16384x128256x4096", "4096x32768x4096"]
CPU_CHUNKS = [512, 1024, 2048]
GPU_CHUNKS = [1024, 2048, 4096, 8192]


def full_logits(hidden: Array, kernel: Array, targets: Array) -> Array:
    """Plain jax: all logits in float32, mean of log-sum-exp minus the target's logit."""
    logits = jnp.dot(hidden, kernel, preferred_element_type=jnp.float32)
    picked = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - picked)


def rounded_logits(hidden: Array, kernel: Array, targets: Array) -> Array:
    """Plain jax as models of 16 bits often do it: logits, and so their gradient, rounded to the dtype of the head."""
    logits = (hidden @ kernel).astype(jnp.float32)
    picked = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - picked)


def chunked(chunk: int | None) -> Loss:
    """Ours."""

    def loss(hidden: Array, kernel: Array, targets: Array) -> Array:
        weights = jnp.full(targets.shape, 1 / targets.shape[0])
        return linear_cross_entropy(hidden, kernel, targets, weights, chunk=chunk)[0]

    return loss


def tokamax_losses() -> dict[str, Loss]:
    """tokamax, its own choice of implementation; nothing where it is not installed."""
    try:
        import tokamax
    except ImportError:
        print("tokamax is not installed: left out")
        return {}

    def loss(hidden: Array, kernel: Array, targets: Array) -> Array:
        return tokamax.linear_softmax_cross_entropy_loss(hidden, targets, kernel, reduction="mean")

    return {"tokamax": loss}


def compile_side(loss: Loss, arguments: tuple[Array, Array, Array]) -> tuple[Callable[[], float], dict[str, float]]:
    """A function that runs value and gradients once and returns the seconds; value and temporary MiB of the side."""
    compiled = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(*arguments).compile()
    value = float(compiled(*arguments)[0])

    def run() -> float:
        start = time.perf_counter()
        jax.block_until_ready(compiled(*arguments))
        return time.perf_counter() - start

    return run, {"value": value, "temporary_mib": compiled.memory_analysis().temp_size_in_bytes / 2**20}


def measure(size: str, dtype: str, losses: dict[str, Loss], rounds: int) -> dict[str, dict[str, float]]:
    """Figures of every side at one size; a side that cannot run there is named and left out."""
    tokens, vocab, width = (int(n) for n in size.split("x"))
    keys = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(keys[0], (tokens, width), dtype)
    kernel = jax.random.normal(keys[1], (width, vocab), dtype) / width**0.5
    arguments = hidden, kernel.astype(dtype), jax.random.randint(keys[2], (tokens,), 0, vocab)
    sides, figures = {}, {}
    for name, loss in losses.items():
        try:
            sides[name], figures[name] = compile_side(loss, arguments)
        except (NotImplementedError, ExceptionGroup, jax.errors.JaxRuntimeError) as problem:
            print(f"{name} cannot run {size}: {str(problem).splitlines()[0]}")
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds):
        names = list(sides)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            seconds[name].append(sides[name]())
    for name, times in seconds.items():
        median = statistics.median(times)
        figures[name] |= {"ms": median * 1e3, "tflops": 6 * tokens * width * vocab / median / 1e12}
        figures[name] |= {"fastest_ms": min(times) * 1e3, "slowest_ms": max(times) * 1e3}
    return figures


def main() -> None:
    """Measure every size, print the figures, then the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", help="TOKENSxVOCABULARYxWIDTH; by default those of the platform")
    parser.add_argument("--dtype", help="of hidden and kernel; by default float32 on a CPU, bfloat16 elsewhere")
    parser.add_argument("--chunks", nargs="+", type=int, help="tokens a chunk; by default those of the platform")
    parser.add_argument("--rounds", type=int, help="rounds; by default 5 on a CPU, 20 elsewhere")
    parser.add_argument("--json", type=Path, help="where to keep the figures")
    arguments = parser.parse_args()
    del sys.argv[1:]  # tokamax reads the command line too, and stops at words that are not its own
    on_cpu = jax.default_backend() == "cpu"
    dtype = arguments.dtype or ("float32" if on_cpu else "bfloat16")
    rounds = arguments.rounds or (5 if on_cpu else 20)
    chunks = arguments.chunks or (CPU_CHUNKS if on_cpu else GPU_CHUNKS)
    losses: dict[str, Loss] = {"full logits": full_logits}
    if jnp.dtype(dtype).itemsize < 4:
        losses |= {"rounded logits": rounded_logits, "one chunk": chunked(None)}
    losses |= tokamax_losses() | {f"chunk {chunk}": chunked(chunk) for chunk in chunks}
    sizes = arguments.sizes or (CPU_SIZES if on_cpu else GPU_SIZES)
    results = {size: measure(size, dtype, losses, rounds) for size in sizes}
    device = jax.devices()[0].device_kind
    print(f"{device}, jax {jax.__version__}, {dtype}, medians of {rounds} rounds; 6 tokens x width x vocabulary FLOP")
    for size, figures in results.items():
        for name, f in figures.items():
            spread = f"{f['fastest_ms']:.1f} to {f['slowest_ms']:.1f}"
            speed = f"{f['ms']:.1f} ms ({spread}), {f['tflops']:.3f} TFLOP/s"
            print(f"{size}  {name:14} {speed}, {f['temporary_mib']:.0f} MiB temporary, loss {f['value']:.6f}")
    if arguments.json:
        about = {"device": device, "jax": jax.__version__, "dtype": dtype, "rounds": rounds, "results": results}
        arguments.json.write_text(json.dumps(about, indent=1) + "\n")
    print("speed / full logits, memory / full logits")
    for size, figures in results.items():
        base = figures["full logits"]
        for name, f in figures.items():
            memory = f["temporary_mib"] / max(base["temporary_mib"], 1e-9)
            print(f"{size}  {name:14} {base['ms'] / f['ms']:.2f}  {memory:.3f}")


if __name__ == "__main__":
    main()
