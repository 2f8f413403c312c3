"""How fast a model folder is read: 2 GB of bfloat16 tensors made up, then read from the page cache onto one device.

`python -m scripts.bench_import [FOLDER]`: makes the folder where it is missing (without one, a temporary folder), reads
it a few times, and prints GB/s of the files and the host memory beyond the parameters at its highest. The first reading
also pays for memory that the machine has never touched.
"""

import gc
import json
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import ml_dtypes
import numpy as np
from flax.core import meta

from llmjax.models import llama, mapping
from llmjax.models.hf import CONFIG, open_hf, write_weights
from llmjax.models.safetensors import Kind
from llmjax.parallel.mesh import MeshConfig, shardings

ROUNDS = 4


def make(folder: Path) -> None:
    """Llama 3.2 1B with 12 of its 16 layers, in files of half a gigabyte."""
    config = replace(llama.llama32("1B"), layers=12)
    kinds = {n: Kind(s, np.dtype(ml_dtypes.bfloat16)) for n, s in mapping.shapes(config, llama.FAMILY).items()}
    noise = np.random.default_rng(0).integers(0, 2**14, 2**22, np.uint16).view(ml_dtypes.bfloat16)

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        for name, kind in kinds.items():
            yield name, np.resize(noise, kind.shape)

    folder.mkdir(parents=True, exist_ok=True)
    write_weights(folder, kinds, tensors(), 500_000_000)
    (folder / CONFIG).write_text(json.dumps(llama.FAMILY.to_hf_config(config)))


def private() -> int:
    """Bytes of this process that are no pages of files."""
    status = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in status if line.startswith("RssAnon")))


def watched(work: Callable[[], Any]) -> tuple[Any, float, int]:
    """The result of `work`, its seconds, and by how many bytes the process grew at most."""
    gc.collect()
    before, highest, done = private(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            highest[0] = max(highest[0], private())

    thread = threading.Thread(target=watch)
    thread.start()
    start = time.perf_counter()
    result = jax.block_until_ready(work())
    seconds = time.perf_counter() - start
    done.set()
    thread.join()
    return result, seconds, max(highest[0], private()) - before


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(temporary)
        if not (folder / CONFIG).exists():
            make(folder)
        opened = open_hf(folder)
        boxed = opened.config.boxed()
        shapes = meta.unbox(boxed)
        places = shardings(nn.get_partition_spec(boxed), shapes, MeshConfig().build())
        size = sum(tensor.nbytes for tensor in opened.tensors.values())
        for tensor in opened.tensors.values():
            tensor.view(np.uint16).max()  # into the page cache
        for dtype in ("float32", "bfloat16"):
            for number in range(ROUNDS):
                wanted = jax.tree.map(
                    lambda x, place, dtype=dtype: jax.ShapeDtypeStruct(x.shape, dtype, sharding=place), shapes, places
                )
                params, seconds, grown = watched(lambda wanted=wanted: opened.params(wanted))
                beyond = grown - sum(leaf.nbytes for leaf in jax.tree.leaves(params))
                speed = f"{size / seconds / 1e9:.2f} GB/s of {size / 1e9:.2f} GB"
                print(f"{dtype} {number}: {speed}, {beyond / 1e6:.0f} MB beyond the parameters", flush=True)
                del params


if __name__ == "__main__":
    main()
