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
    print(prompt, end="", flush=True)
    found = sample(opened, prompt, echo=True)
    print()
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
    """One continuation of `prompt`; with `echo` it is printed as it comes."""
    experiment = opened.experiment
    emit = (lambda _, piece: print(visible(piece), end="", flush=True)) if echo else None
    config, codec = experiment.generate, opened.pipeline.tokenizer
    return complete(config, experiment.model, opened.params, codec, [prompt], emit=emit)[0]
