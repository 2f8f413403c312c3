"""The `llmjax` command: one module a verb, imported when it is called, so that help costs no jax.

Exit codes: 0 done (also after SIGTERM or SIGINT with the step saved), 1 a failed run, 2 bad input. The latter two say
why in one line on stderr. With `--json` the last line of stdout is one JSON object.
"""

import argparse
import importlib
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from llmjax import __version__
from llmjax.cli.verbs import VERBS, Verb
from llmjax.config import InputError, did_you_mean
from llmjax.train.errors import RunError, disk_full


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line (without the program's name) and return its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        return run(words)
    except InputError as error:
        return fail(error, 2)
    except KeyboardInterrupt:
        return fail("interrupted", 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else the interpreter's last flush fails again
        return fail("nobody reads the output any more", 1)
    except Exception as error:
        if not expected(error):
            raise
        return fail(error, 1)


def run(words: Sequence[str]) -> int:
    """Call the verb that `words` begin with."""
    if not words or words[0] in ("-h", "--help", "help"):
        print(overview())
        return 0
    if words[0] == "--version":
        print(f"llmjax {__version__}")
        return 0
    if words[0] not in VERBS:
        hint = did_you_mean(words[0], VERBS) or f": the verbs are {', '.join(VERBS)}"
        raise InputError(f"unknown verb {words[0]}{hint}")
    verb = VERBS[words[0]]
    arguments = read(verb, words[1:])
    if arguments is None:
        return 0
    result = importlib.import_module(f"llmjax.cli.commands.{verb.module or verb.name}").run(arguments)
    if arguments.json:
        print(json.dumps(jsonable(result), ensure_ascii=False), flush=True)
    return 0


def overview() -> str:
    """What `llmjax --help` prints."""
    width = max(map(len, VERBS)) + 2
    lines = [f"  {verb.name:<{width}}{verb.summary}" for verb in VERBS.values()]
    return "\n".join(
        [
            "usage: llmjax VERB ... [--path.to.field=value ...] [--json]",
            "",
            "Train, measure and sample language models; an experiment is a Python file, a run is a directory.",
            "",
            *lines,
            "",
            "llmjax VERB --help explains a verb. Any field of an experiment is set by its path: --train.steps=100,",
            "--model.pattern.0.mixer='Attention(heads=8)'. --json makes the last line of stdout one JSON object.",
        ]
    )


class Parser(argparse.ArgumentParser):
    """A parser whose complaints are InputErrors of one line."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage and leaving."""
        raise InputError(f"{self.prog}: {message}: see {self.prog} --help")


def read(verb: Verb, words: Sequence[str]) -> argparse.Namespace | None:
    """The verb's arguments, overrides of fields as the list `overrides`; None where only help was asked for."""
    parser = Parser(
        prog=f"llmjax {verb.name}",
        usage=f"llmjax {verb.name} {verb.usage} [--json]",
        description=verb.description,
        epilog=f"example:\n  {verb.example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        add_help=False,
    )
    for names, options in verb.arguments:
        parser.add_argument(*names, **options)
    parser.add_argument("--json", action="store_true", help="make the last line of stdout one JSON object")
    parser.add_argument("-h", "--help", action="store_true", help="show this help")
    if {"-h", "--help"} & set(words):
        print(parser.format_help(), end="")
        return None
    arguments, rest = parser.parse_known_args(words)
    if rest and not verb.overrides:
        known = [name for action in parser._actions for name in action.option_strings]
        raise InputError(f"llmjax {verb.name} does not know {rest[0]}{did_you_mean(rest[0].partition('=')[0], known)}")
    arguments.overrides, arguments.argv = rest, ["llmjax", verb.name, *words]
    return arguments


def expected(error: Exception) -> bool:
    """Whether the error is a run's own failure, told in one line: a full disk, or what the loop calls a failed run."""
    return isinstance(error, RunError) or disk_full(error)


def fail(error: Exception | str, code: int) -> int:
    """Say the error in one line on stderr; returns `code`."""
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
    return code


def jsonable(value: Any) -> Any:
    """`value` in JSON's terms: numbers that JSON cannot write become null, arrays lists, the rest text."""
    if isinstance(value, Mapping):
        return {str(key): jsonable(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(part) for part in value]
    if isinstance(value, bool | int | str) or value is None:
        return value
    if hasattr(value, "tolist"):
        return jsonable(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value)
