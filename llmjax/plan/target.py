"""Targets by name: which chips a plan is for, and what is missing to compile for them."""

import difflib
import importlib.util
import math
from dataclasses import dataclass
from importlib import resources

from llmjax.config import InputError, did_you_mean
from llmjax.plan.chips import CHIPS, Chip

EXAMPLES = "v5p:4x4x4, v6e:16x16, h200:1x1x8 or cpu:8"
FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
CUBES = (
    *("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x4x12", "4x4x16", "4x8x8", "8x8x8", "8x8x16"),
    *("8x16x16", "16x16x16", "16x16x24"),
)


@dataclass(frozen=True)
class Target:
    """A number of chips and how they are joined; `chip` is None for the CPU of this machine."""

    text: str
    chip: Chip | None
    shape: tuple[int, ...]

    @property
    def chips(self) -> int:
        """Number of chips, as their makers count them."""
        return math.prod(self.shape)


def parse(text: str) -> Target:
    """The target that `read` makes of the text; raises InputError where the chip's compiler is not there, too."""
    target = read(text)
    if target.chip is not None:
        check_compiler(target.chip)
    return target


def read(text: str) -> Target:
    """The target `chip:AxBxC`; raises InputError for another form, or an unknown chip."""
    name, colon, sizes = text.partition(":")
    parts = sizes.split("x")
    if not colon or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise InputError(f"target={text!r} is not of the form chip:AxBxC: use for example {EXAMPLES}")
    shape = tuple(map(int, parts))
    if name == "cpu":
        if len(shape) > 1:
            raise InputError(f"target={text!r}: a CPU takes a number of devices: use cpu:{math.prod(shape)}")
        return Target(text, None, shape)
    if name not in CHIPS:
        hint = did_you_mean(name, CHIPS) or f": there are {', '.join(CHIPS)} and cpu"
        raise InputError(f"target={text!r} names no chip that is known{hint}")
    return Target(text, CHIPS[name], shape)


def check_compiler(chip: Chip) -> None:
    """Raise InputError where the compiler for a chip, or its description of a GPU, is not installed."""
    if chip.platform == "tpu":
        if importlib.util.find_spec("libtpu") is None:
            raise InputError(f"no compiler for {chip.name}: install llmjax[tpu], which brings libtpu")
        return
    descriptions = {file.name.removesuffix(".txtpb") for file in resources.files("pallas_kernels.chips").iterdir()}
    if chip.name not in descriptions:
        described = ", ".join(sorted(descriptions & set(CHIPS)))
        raise InputError(f"no description of {chip.name} for its compiler: GPUs that have one are {described}")
    if not any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)):
        raise InputError(f"no compiler for {chip.name}: install llmjax[cuda], which brings jax's CUDA plugin")


def unknown_topology(target: Target) -> InputError:
    """The error for a slice that its compiler does not know, with the nearest that there are."""
    name, _, sizes = target.text.partition(":")
    if target.chip is not None and target.chip.platform == "gpu":
        return InputError(
            f"target={target.text!r} is no topology of GPUs: use hosts x 1 x GPUs a host, as {name}:1x1x8"
        )
    known = FLAT if target.chip is not None and target.chip.wraps == 16 else CUBES
    alike = difflib.get_close_matches(sizes, known, n=1)
    by_size = sorted(known, key=lambda other: abs(math.log(math.prod(map(int, other.split("x"))) / target.chips)))
    near = list(dict.fromkeys([*alike, *by_size]))[:3]
    listed = ", ".join(f"{name}:{other}" for other in near)
    return InputError(f"target={target.text!r} is no slice that its compiler knows: the nearest are {listed}")
