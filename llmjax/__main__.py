"""`python -m llmjax` is the `llmjax` command."""

from llmjax.cli.program import run

if __name__ == "__main__":
    run()
