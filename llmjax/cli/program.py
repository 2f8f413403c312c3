"""The installed command: `main` in a process whose large arrays lie on large pages, where the system offers them."""

import os
import sys
from pathlib import Path
from typing import NoReturn

from llmjax.cli import main

PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
TUNABLE = "glibc.malloc.hugetlb=1"


def run() -> NoReturn:
    """Run the command line and leave with its exit code.

    On a CPU every step of a run takes hundreds of megabytes from the allocator and gives them back; on pages of 4 kB
    that costs a quarter of the step. The C library reads its settings only when a process starts.
    """
    words = sys.argv[1:]
    if words and words[0] in ("train", "eval", "generate") and offered():
        os.environ["GLIBC_TUNABLES"] = TUNABLE
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    code = main()
    if code and any(word.startswith("--hosts") for word in words):
        leave(code)
    sys.exit(code)


def leave(code: int) -> NoReturn:
    """Leave at once: jax's own farewell waits for all processes of a run, and the others may wait for this one."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def offered() -> bool:
    """Whether the system gives large pages to those who ask, and nobody has set the allocator yet."""
    return "GLIBC_TUNABLES" not in os.environ and PAGES.exists() and "[madvise]" in PAGES.read_text()
