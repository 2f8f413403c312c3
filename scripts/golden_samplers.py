"""Write tests/decode/golden/samplers.npz: logits, and what transformers' logits processors make of them.

Run with an environment that has torch and transformers (`make setup-parity`).
"""

import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
CASES = {
    "temperature_0.7": ("TemperatureLogitsWarper", {"temperature": 0.7}),
    "temperature_1.8": ("TemperatureLogitsWarper", {"temperature": 1.8}),
    "top_k_1": ("TopKLogitsWarper", {"top_k": 1}),
    "top_k_7": ("TopKLogitsWarper", {"top_k": 7}),
    "top_k_500": ("TopKLogitsWarper", {"top_k": 500}),
    "top_p_0.05": ("TopPLogitsWarper", {"top_p": 0.05}),
    "top_p_0.5": ("TopPLogitsWarper", {"top_p": 0.5}),
    "top_p_0.95": ("TopPLogitsWarper", {"top_p": 0.95}),
    "min_p_0.02": ("MinPLogitsWarper", {"min_p": 0.02}),
    "min_p_0.3": ("MinPLogitsWarper", {"min_p": 0.3}),
    "repetition_penalty_1.3": ("RepetitionPenaltyLogitsProcessor", {"penalty": 1.3}),
    "repetition_penalty_0.8": ("RepetitionPenaltyLogitsProcessor", {"penalty": 0.8}),
    "no_repeat_ngram_1": ("NoRepeatNGramLogitsProcessor", {"ngram_size": 1}),
    "no_repeat_ngram_2": ("NoRepeatNGramLogitsProcessor", {"ngram_size": 2}),
    "no_repeat_ngram_3": ("NoRepeatNGramLogitsProcessor", {"ngram_size": 3}),
    "min_tokens_5": ("MinNewTokensLengthLogitsProcessor", {"min_new_tokens": 5, "eos_token_id": [3, 8]}),
}
PROMPT = 20
"""tokens of `history` that count as the prompt in min_tokens"""


def inputs() -> tuple[np.ndarray, np.ndarray]:
    """Logits `[6, 97]`, the last two rows with many ties, and a repetitive history `[6, 24]`."""
    random = np.random.default_rng(0)
    logits = random.normal(size=(6, 97)).astype(np.float32) * np.array([0.5, 1, 2, 4, 2, 2], np.float32)[:, None]
    logits[4:] = np.round(logits[4:])
    return logits, random.integers(0, 5, (6, 24)) * 7


def golden(name: str, logits: np.ndarray, history: np.ndarray) -> np.ndarray:
    """The scores that transformers' processor of that case returns."""
    import torch
    from transformers.generation import logits_process

    kind, arguments = CASES[name]
    if kind.startswith("MinNew"):
        arguments = {"prompt_length_to_skip": PROMPT, **arguments}
    processor = getattr(logits_process, kind)(**arguments)
    return processor(torch.tensor(history), torch.tensor(logits)).numpy()


def main() -> None:
    """Write the file and say where."""
    logits, history = inputs()
    scores = {name: golden(name, logits, history) for name in CASES}
    path = ROOT / "tests" / "decode" / "golden" / "samplers.npz"
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, logits=logits, history=history, **scores)
    sys.stdout.write(f"wrote {path.relative_to(ROOT)}: {len(scores)} cases\n")


if __name__ == "__main__":
    main()
