"""Cached greedy decoding at batch 1 on CPU: ours beside transformers' `generate`, same shape, in turn, in one process.

Run with an environment that has jax, torch and transformers (`make setup-parity`); without torch only ours is measured.
The last line is the ratio of the medians of tokens per second.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import jax

from llmjax.decode.config import Generate
from llmjax.decode.generate import generate
from llmjax.nn.attention import Attention
from llmjax.nn.block import Block
from llmjax.nn.decoder import Decoder
from llmjax.nn.mlp import MLP
from llmjax.nn.norms import LayerNorm
from llmjax.nn.positions import LearnedPositions

LAYERS, WIDTH, HEADS, VOCAB, POSITIONS = 6, 384, 6, 8192, 1024


def ours(prompt: list[int], tokens: int) -> Callable[[], int]:
    """A function that generates `tokens` tokens with llmjax and returns how many it made."""
    block = Block(Attention(heads=HEADS, rope=None, bias=True, out_bias=True), MLP(bias=True), LayerNorm())
    model = Decoder(
        vocab=VOCAB,
        d_model=WIDTH,
        layers=LAYERS,
        pattern=(block,),
        norm=LayerNorm(),
        positions=LearnedPositions(POSITIONS),
        tied=True,
    )
    params = model.init(jax.random.key(0))
    config = Generate(max_tokens=tokens, temperature=0.0)
    return lambda: int(generate(config, model, params, [prompt]).lengths[0])


def theirs(prompt: list[int], tokens: int) -> Callable[[], int] | None:
    """The same with transformers' GPT-2, or None where torch or transformers is missing."""
    try:
        import torch
        from transformers import GPT2Config, GPT2LMHeadModel
    except ImportError:
        return None
    config = GPT2Config(vocab_size=VOCAB, n_positions=POSITIONS, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS)
    config.bos_token_id = config.eos_token_id = None
    model = GPT2LMHeadModel(config).eval()
    ids = torch.tensor([prompt])
    settings = dict(max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, use_cache=True, pad_token_id=0)

    def run() -> int:
        with torch.inference_mode():
            return model.generate(ids, attention_mask=torch.ones_like(ids), **settings).shape[1] - len(prompt)

    return run


def main() -> None:
    """Measure in turn and print each round, the medians and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7, help="measurements of each side")
    parser.add_argument("--prompt", type=int, default=32, help="length of the prompt in tokens")
    parser.add_argument("--tokens", type=int, default=128, help="tokens to generate")
    arguments = parser.parse_args()
    prompt = list(range(1, arguments.prompt + 1))
    sides = {"llmjax": ours(prompt, arguments.tokens), "transformers": theirs(prompt, arguments.tokens)}
    running = {name: run for name, run in sides.items() if run is not None}
    for run in running.values():
        run()
    speeds: dict[str, list[float]] = {name: [] for name in running}
    for _ in range(arguments.rounds):
        for name, run in running.items():
            start = time.perf_counter()
            made = run()
            speeds[name].append(made / (time.perf_counter() - start))
        print("  ".join(f"{name} {found[-1]:.0f} tokens/s" for name, found in speeds.items()))
    medians = {name: statistics.median(found) for name, found in speeds.items()}
    print("median  " + "  ".join(f"{name} {speed:.1f} tokens/s" for name, speed in medians.items()))
    if "transformers" not in medians:
        print("torch or transformers is not installed here: nothing to compare with (run `make setup-parity`)")
        return
    print(f"ratio {medians['llmjax'] / medians['transformers']:.2f}")


if __name__ == "__main__":
    main()
