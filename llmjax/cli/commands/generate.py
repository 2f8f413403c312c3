"""`llmjax generate RUN_DIR`: a prompt continued, streamed to the terminal."""

from argparse import Namespace
from typing import Any

from llmjax.cli.runs import Run, open_run
from llmjax.decode.text import Completion, complete
from llmjax.report.page import visible


def run(arguments: Namespace) -> dict[str, Any]:
    """Continue the prompt and print it; returns prompt, text, tokens, log-probabilities and why it ended."""
    opened = open_run(arguments.run_dir, arguments.checkpoint, arguments.overrides)
    prompt = opened.experiment.generate.prompt if arguments.prompt is None else arguments.prompt
    found = sample(opened, prompt, echo=True)
    return {
        "prompt": prompt,
        "text": found.text,
        "tokens": found.tokens,
        "log_probs": found.log_probs,
        "model_log_probs": found.model_log_probs,
        "finish": found.finish,
        "step": opened.step,
        "run_dir": arguments.run_dir,
    }


def sample(opened: Run, prompt: str, echo: bool = False) -> Completion:
    """One continuation of `prompt`; with `echo` both are printed, as the text comes."""
    experiment, codec = opened.experiment, opened.pipeline.tokenizer
    shown = [prompt]  # held back until the first piece, so that a prompt that does not fit leaves only its error

    def emit(row: int, piece: str) -> None:
        del row
        print(visible("".join(shown) + piece), end="", flush=True)
        shown.clear()

    follow = emit if echo else None
    found = complete(experiment.generate, experiment.model, opened.params, codec, [prompt], emit=follow)[0]
    if echo:
        print("".join(shown))
    return found
