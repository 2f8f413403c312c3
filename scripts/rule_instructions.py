"""Write instructions made up by rule to a JSONL file: what experiments/finetune/instruct.py:tiny trains on.

    python -m scripts.rule_instructions instructions.jsonl
    python -m scripts.rule_instructions repeating.jsonl "Repeat the word"

The first writes those of RULES, the second one of NEW.
"""

import json
import random
import sys
from collections.abc import Callable
from pathlib import Path

RULES: dict[str, Callable[[str], str]] = {
    "Uppercase the word": str.upper,
    "Reverse the word": lambda word: word[::-1],
    "Count the letters": lambda word: str(len(word)),
    "Write the first letter": lambda word: word[0],
}
NEW: dict[str, Callable[[str], str]] = {"Repeat the word": str}


def main(path: str, *names: str) -> None:
    rules = RULES | NEW
    write(Path(path), {name: rules[name] for name in names or RULES})


def write(path: Path, rules: dict[str, Callable[[str], str]], count: int = 4000, seed: int = 0) -> None:
    """`count` records, each of one of the rules and a random word of 3 or 4 of the letters a to h."""
    draw = random.Random(seed)
    with path.open("w") as out:
        for _ in range(count):
            name = draw.choice(sorted(rules))
            word = "".join(draw.choices("abcdefgh", k=draw.randint(3, 4)))
            out.write(json.dumps({"instruction": name, "input": word, "output": rules[name](word)}) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
