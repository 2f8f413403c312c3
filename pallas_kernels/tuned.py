"""Block sizes found by tuning, as data: `configs/CHIP.json`, one entry a kernel, shape bucket, dtype and causality.

`scripts/tune.py` writes the files; each entry names its source (the compiler's estimate or a measurement) and its date.
"""

import functools
import json
import math
from importlib import resources
from typing import Any

import numpy as np

from pallas_kernels.chips import chip_of

MOST_OCTAVES = 2
"""An entry of more than 2 ** this times the length of a call says nothing about it: its blocks would be padding."""


def tuned(
    kernel: str,
    device_kind: str,
    query_shape: tuple[int, ...],
    key_shape: tuple[int, ...],
    value_shape: tuple[int, ...],
    dtype: Any,
    causal: bool,
) -> dict[str, Any] | None:
    """The fields of the tuned Config for a call with these shapes (`[batch, length, heads, head_dim]`), or None.

    Chip, kernel, head dims, dtype and causality must be those of an entry. Of such entries the one with the nearest
    lengths is taken: least |log2(query length ratio)| + |log2(key length ratio)|, of equal ones the shorter. Entries
    more than 4 times longer than the call do not count; calls longer than every entry take the longest, because block
    sizes stop mattering beyond some length.
    """
    chip = chip_of(device_kind)
    lengths = (query_shape[1], key_shape[1])
    wanted = (kernel, query_shape[-1], value_shape[-1], np.dtype(dtype).name, causal)
    found = []
    for entry in entries(chip.name) if chip is not None and min(lengths) > 0 else ():
        if wanted == tuple(entry[name] for name in ("kernel", "head_dim", "value_dim", "dtype", "causal")):
            tuned_for = (entry["query_length"], entry["key_length"])
            octaves = [math.log2(entry_length / length) for entry_length, length in zip(tuned_for, lengths)]
            if max(octaves) <= MOST_OCTAVES:
                found.append((sum(map(abs, octaves)), tuned_for, entry["config"]))
    return dict(min(found, key=lambda candidate: candidate[:2])[2]) if found else None


@functools.cache
def entries(chip: str) -> tuple[dict[str, Any], ...]:
    """The entries of `configs/CHIP.json`; none where there is no such file."""
    path = resources.files("pallas_kernels").joinpath("configs", f"{chip}.json")
    return tuple(json.loads(path.read_text())["entries"]) if path.is_file() else ()
