"""What a base model is changed by: every adapter, found by type and several at a time, and its matrices in few bits."""

import math
from collections.abc import Collection, Sequence

from llmjax.adapters import Adapted, Adapter, Bottleneck
from llmjax.config import subclasses
from llmjax.nn.decoder import Decoder
from llmjax.nn.model import Model
from llmjax.nn.projections import projections
from llmjax.quant.integers import Integer
from llmjax.quant.nf4 import NF4
from llmjax.quant.quantised import Quantised
from llmjax.quant.quantize import Quantize
from tests.adapters.cases import METHODS, small

TOGETHER = 5
SMALL = {
    "Bottleneck": {"size": 3},
    "Compacter": {"size": 4, "terms": 2},
    "Gated": {"adapter": Bottleneck(size=3)},
    "GatedPrefix": {"count": 2},
    "Mixture": {"adapter": Bottleneck(size=3), "experts": 2},
    "PTuning": {"count": 2, "hidden": 5},
    "PrefixTuning": {"count": 2},
    "PromptTuning": {"count": 2},
}
"""Fields that make those methods small that do not change matrices."""
EVERY = subclasses(Adapter)
QUANT = {
    "none": None,
    "nf4": Quantize(format=NF4(block=8, double=True)),
    "int8": Quantize(format=Integer(bits=8, block="channel")),
}


def packs() -> dict[str, tuple[str, ...]]:
    """Methods that change one model together: those on matrices, those on layers, and those before the first token.

    A prefix behind gates must be the first, and attention has to be all there is: it is alone.
    """
    matrices = list(METHODS)
    slots = [name for name in EVERY if name not in METHODS and adapter(name, Model()).slots() and name != "GatedPrefix"]
    rest = [name for name in EVERY if name not in (*matrices, *slots, "GatedPrefix")]
    parts = [tuple(matrices[i : i + TOGETHER]) for i in range(0, len(matrices), TOGETHER)]
    return {"none": ()} | {"+".join(part): part for part in (*parts, tuple(rest), tuple(slots), ("GatedPrefix",))}


def adapter(name: str, base: Model, blocks: Collection[int] | None = None) -> Adapter:
    """A small adapter of that class; of matrices it changes those of the named blocks that have a rank of 2."""
    if name not in METHODS:
        return EVERY[name](name=name, **SMALL.get(name, {}))
    sizes = {path: (math.prod(p.inputs), math.prod(p.outputs)) for path, p in projections(base).items()}
    fit = [path for path, (rows, columns) in sizes.items() if path != "embed" and rows % 2 == 0 and columns > 1]
    here = [path for path in fit if blocks is None or path.startswith(tuple(f"blocks/{i}/" for i in blocks))]
    return small(name, name=name, targets=f"^({'|'.join(here)})$")


def changed(base: Decoder, names: Sequence[str], quant: str, spread: bool) -> Model:
    """The base in few bits, with these adapters; the base itself where there are none.

    Methods on matrices change all blocks, or `spread` one of them after the other.
    """
    config, count = QUANT[quant], len(base.pattern)
    model = base if config is None else Quantised(base=base, quantize=config)
    turns = [range(i % count, count, len(names)) if spread else None for i in range(len(names))]
    found = tuple(adapter(name, base, turn) for name, turn in zip(names, turns, strict=True))
    return Adapted(base=model, adapters=found) if names else model
