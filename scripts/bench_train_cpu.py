"""Training throughput on CPU: ours beside transformers + PyTorch, eager and compiled, the same model, in turn.

GPT-2 shape, 6 layers, width 384, 6 heads, length 256, batch 8, vocabulary 8192; float32, AdamW, clip 1.0, no dropout.
Each side is a process of its own, stopped while the others are measured, and ours is the real training step of
`llmjax.train`, state donated. Run with an environment that has jax, torch and transformers (`make setup-parity`); sides
whose packages are missing are left out. The last line is the ratio of the medians of tokens per second.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

LAYERS, WIDTH, HEADS, VOCAB, POSITIONS, LENGTH, BATCH = 6, 384, 6, 8192, 1024, 256, 8
TOKENS = BATCH * LENGTH


def llmjax_step() -> Callable[[], None]:
    """One step of ours, compiled."""
    import jax
    import numpy as np

    from llmjax.nn.attention import Attention
    from llmjax.nn.block import Block
    from llmjax.nn.decoder import Decoder
    from llmjax.nn.mlp import MLP
    from llmjax.nn.norms import LayerNorm
    from llmjax.nn.positions import LearnedPositions
    from llmjax.objectives.next_token import NextToken
    from llmjax.parallel.mesh import MeshConfig
    from llmjax.train.config import Train
    from llmjax.train.optimizers import AdamW
    from llmjax.train.state import plan
    from llmjax.train.step import Compiled, Step, apply_of

    block = Block(Attention(heads=HEADS, rope=None, bias=True, out_bias=True), MLP(bias=True), LayerNorm())
    positions = LearnedPositions(POSITIONS)
    shape = {"vocab": VOCAB, "d_model": WIDTH, "layers": LAYERS, "pattern": (block,), "positions": positions}
    model = Decoder(**shape, norm=LayerNorm(), tied=True)
    tokens = np.random.default_rng(0).integers(0, VOCAB, (BATCH, LENGTH + 1), np.int32)
    batch = {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "loss_mask": np.ones((BATCH, LENGTH), np.float32),
        "positions": np.broadcast_to(np.arange(LENGTH, dtype=np.int32), (BATCH, LENGTH)),
        "segment_ids": np.ones((BATCH, LENGTH), np.int32),
        "target_bytes": np.ones((BATCH, LENGTH), np.int32),
    }
    train, mesh = Train(), MeshConfig().build()
    planned = plan(model, AdamW(), train, mesh)
    compiled = Compiled(Step(apply_of(model.build()), NextToken(), planned.optimizer, train), planned, mesh)
    compiled.compile(batch)
    state = planned.init(0)

    def step() -> None:
        nonlocal state
        state, metrics = compiled(state, batch, 3e-4, 0, 0)
        jax.block_until_ready(metrics)

    return step


def torch_step(compiled: bool) -> Callable[[], None]:
    """One step of transformers' GPT-2 in PyTorch."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = GPT2Config(
        vocab_size=VOCAB, n_positions=POSITIONS, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, use_cache=False, **dropout
    )
    config.bos_token_id = config.eos_token_id = None
    model = GPT2LMHeadModel(config).train()
    forward = torch.compile(model) if compiled else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1)
    tokens = torch.randint(0, VOCAB, (BATCH, LENGTH))

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        forward(input_ids=tokens, labels=tokens).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


SIDES: dict[str, Callable[[], Callable[[], None]]] = {
    "llmjax": llmjax_step,
    "eager": lambda: torch_step(compiled=False),
    "compiled": lambda: torch_step(compiled=True),
}


def serve(side: str) -> None:
    """Answer each line on stdin, a number of steps, with the seconds that each of them took."""
    step = SIDES[side]()
    for _ in range(3):
        step()
    print("ready", flush=True)
    for line in sys.stdin:
        seconds = []
        for _ in range(int(line)):
            start = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - start)
        print(json.dumps(seconds), flush=True)


def start(side: str) -> subprocess.Popen | None:
    """A process that serves one side, warmed up; None where it cannot run here."""
    environment = os.environ | ({"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"} if side == "llmjax" else {})
    command = [sys.executable, __file__, "--serve", side]
    process = subprocess.Popen(command, stdin=-1, stdout=-1, stderr=subprocess.DEVNULL, text=True, env=environment)
    if process.stdout.readline().strip() == "ready":
        return process
    print(f"{side}: cannot run here, left out")
    return None


def main() -> None:
    """Measure in turn and print each round, the medians and their ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="rounds; each measures every side once")
    parser.add_argument("--steps", type=int, default=4, help="steps in a measurement")
    parser.add_argument("--serve", choices=list(SIDES), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.serve)
        return
    running = {side: process for side in SIDES if (process := start(side))}
    seconds: dict[str, list[float]] = {side: [] for side in running}
    for _ in range(arguments.rounds):
        for side, process in running.items():
            print(arguments.steps, file=process.stdin, flush=True)
            seconds[side] += json.loads(process.stdout.readline())
        print("  ".join(f"{side} {TOKENS / statistics.median(s):.0f} tokens/s" for side, s in seconds.items()))
    for process in running.values():
        process.stdin.close()
        process.wait()
    speeds = {side: TOKENS / statistics.median(s) for side, s in seconds.items()}
    print("median  " + "  ".join(f"{side} {speed:.0f} tokens/s" for side, speed in speeds.items()))
    others = [side for side in speeds if side != "llmjax"]
    print("ratio  " + "  ".join(f"llmjax / {side} {speeds['llmjax'] / speeds[side]:.2f}" for side in others))


if __name__ == "__main__":
    main()
