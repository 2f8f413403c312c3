"""Collectives of a compiled program: what each chip sends, along which axis of the mesh, how often, and when."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from llmjax.plan.hlo import Instruction, Module

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
STARTS = {f"{kind}-start" for kind in (*KINDS, "async")}
DONES = {f"{kind}-done" for kind in (*KINDS, "async")}


@dataclass(frozen=True)
class Collective:
    """One collective instruction."""

    name: str
    kind: str
    computation: str
    times: float
    """Executions in one step."""
    nbytes: float
    """Bytes that each chip sends in one execution of the ring algorithm."""
    group: tuple[int, ...]
    """Devices (positions in the mesh) of the first group; of a permute, those of the first chain."""
    asynchronous: bool
    """Whether it starts and ends in two instructions, with others between."""


def collectives(module: Module, devices: int) -> Iterator[Collective]:
    """Every collective of the module, as often as it runs, on so many devices."""
    for computation, times in module.runs():
        for one in module.computations.get(computation, ()):
            kind, real = classify(module, one)
            if kind is None:
                continue
            group = first_group(real, devices)
            if len(group) < 2:
                continue
            given = sum(operand.nbytes for operand in module.operands(real))
            sent = given * sent_share(kind, len(group))
            yield Collective(one.name, kind, computation, times, sent, group, begins(module, one))


def classify(module: Module, one: Instruction) -> tuple[str | None, Instruction]:
    """The kind of collective that an instruction is, if any, and the instruction that holds its groups.

    XLA:TPU writes a reduce-scatter as a fusion of an all-reduce with the slice that each chip keeps, and fuses an
    asynchronous collective into what runs meanwhile: it counts where it begins.
    """
    opcode = one.opcode.removesuffix("-start")
    if opcode in KINDS:
        return opcode, one
    if one.opcode not in ("fusion", "async-start") or ends(module, one):
        return None, one
    for called in one.called("calls"):
        body = module.computations.get(called, [])
        inner = next((x for x in body if x.opcode.removesuffix("-start") in KINDS), None)
        if inner is None or called.startswith("async_collective_fusion"):
            continue
        kind = inner.opcode.removesuffix("-start")
        return ("reduce-scatter" if called.startswith("all-reduce-scatter") else kind), inner
    return None, one


def begins(module: Module, one: Instruction) -> bool:
    """Whether an asynchronous collective begins with this instruction."""
    return one.opcode in STARTS or calls_target(module, one, "AsyncCollectiveStart")


def ends(module: Module, one: Instruction) -> bool:
    """Whether an asynchronous collective ends with this instruction."""
    return one.opcode in DONES or calls_target(module, one, "AsyncCollectiveDone")


def calls_target(module: Module, one: Instruction, target: str) -> bool:
    """Whether a fusion holds the custom call `target`."""
    if one.opcode != "fusion":
        return False
    bodies = (module.computations.get(name, []) for name in one.called("calls"))
    return any(x.opcode == "custom-call" and f'"{target}"' in x.attributes for body in bodies for x in body)


def sent_share(kind: str, n: int) -> float:
    """Bytes that a chip sends for each byte of its operands, among n chips (ring algorithms; Chan et al. 2007)."""
    return {
        "all-gather": n - 1.0,
        "all-reduce": 2.0 * (n - 1) / n,
        "reduce-scatter": (n - 1) / n,
        "all-to-all": (n - 1) / n,
        "ragged-all-to-all": (n - 1) / n,
    }.get(kind, 1.0)


def first_group(one: Instruction, devices: int) -> tuple[int, ...]:
    """The devices that take part together, from any of the forms in which XLA writes them."""
    pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", one.attributes)
    if pairs:
        return chain([(int(a), int(b)) for a, b in re.findall(r"\{(\d+),(\d+)", pairs[1] + "}")])
    text = one.attributes.partition("replica_groups=")[2]
    mesh = re.match(r"mesh\[([^\]]*)\](?:, device_ids=\((.*?\)?)\))? \{([^}]*)\}", text)
    if mesh:
        return mesh_group(mesh[1], mesh[2], mesh[3], devices)
    iota = re.match(r"\[(\d+),(\d+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", text)
    if iota:
        return tuple(iota_ids(iota[3])[: int(iota[2])].tolist())
    listed = re.match(r"\{\{([\d,]+)\}", text)
    return tuple(map(int, listed[1].split(","))) if listed else tuple(range(devices))


def chain(pairs: list[tuple[int, int]]) -> tuple[int, ...]:
    """The devices that a permute's pairs link, from the first pair on."""
    following = dict(pairs)
    seen = [pairs[0][0]] if pairs else []
    while seen and (after := following.get(seen[-1])) is not None and after not in seen:
        seen.append(after)
    return tuple(seen)


def iota_ids(text: str) -> np.ndarray:
    """The device ids that `[2,32]T(1,0)` stands for, flat."""
    sizes, _, order = text.partition("T")
    dims = [int(n) for n in re.findall(r"\d+", sizes)]
    ids = np.arange(int(np.prod(dims))).reshape(dims)
    return ids.transpose([int(n) for n in re.findall(r"\d+", order)]).reshape(-1) if order else ids.reshape(-1)


def mesh_group(sizes: str, ids: str | None, axes: str, devices: int) -> tuple[int, ...]:
    """The first group of `mesh['a'=2,'b'=(...)] {'a'}`; an axis may be used in part, as `'a':(2)4`."""
    names = re.findall(r"'([^']+)'=(\d+)", sizes)
    shape = [int(size) for _, size in names]
    order = np.arange(devices)
    if ids is not None:
        order = iota_ids(ids) if "[" in ids else np.array([int(n) for n in re.findall(r"\d+", ids)])
    grid = order.reshape(shape)
    picks: list[np.ndarray] = [np.array([0])] * len(shape)
    for name, before, part in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", axes):
        axis = [n for n, _ in names].index(name)
        inner = shape[axis] // (int(before) * int(part)) if part else 1
        picks[axis] = np.arange(int(part) if part else shape[axis]) * inner
    return tuple(grid[np.ix_(*picks)].reshape(-1).tolist())


def axis_of(group: tuple[int, ...], sizes: dict[str, int]) -> str:
    """The axes of a mesh along which the devices of a group differ, in the order of `sizes`: "fsdp" or "data+fsdp"."""
    places = np.array(np.unravel_index(np.array(group), tuple(sizes.values())))
    return "+".join(name for name, row in zip(sizes, places) if len(set(row.tolist())) > 1)
