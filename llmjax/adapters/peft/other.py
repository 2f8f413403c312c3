"""Methods that are not LoRA in peft's names: VeRA, IA3, LoHa, LoKr, OFT, BOFT."""

from collections.abc import Mapping
from typing import Any

from llmjax.adapters.boft import BOFT
from llmjax.adapters.ia3 import IA3, writes
from llmjax.adapters.loha import LoHa
from llmjax.adapters.lokr import LoKr
from llmjax.adapters.oft import OFT
from llmjax.adapters.peft.modules import Part
from llmjax.adapters.vera import VeRA
from llmjax.config import InputError
from llmjax.nn.projections import Projection

VERA_SHARED = (Part("a", "vera_A", "r i -> i r"), Part("b", "vera_B", "o r -> r o"))
"""VeRA's two matrices of the whole model."""


def vera_parts(adapter: VeRA, projection: Projection) -> tuple[Part, ...]:
    """The two vectors."""
    return Part("lambda_d", "vera_lambda_d", "r -> r"), Part("lambda_b", "vera_lambda_b", "O -> O")


def vera_config(adapter: VeRA) -> dict[str, Any]:
    """The keys of VeRA; the matrices stand in the file, for libraries draw other numbers from one seed."""
    return {
        "r": adapter.rank,
        "d_initial": adapter.initial,
        "vera_dropout": adapter.dropout,
        "projection_prng_key": adapter.seed,
        "save_projection": True,
        "bias": "none",
    }


def vera_of(theirs: Mapping[str, Any]) -> VeRA:
    """Our VeRA."""
    return VeRA(
        rank=theirs.get("r", 256),
        initial=float(theirs.get("d_initial", 0.1)),
        dropout=float(theirs.get("vera_dropout", 0.0)),
        seed=theirs.get("projection_prng_key", 0),
    )


def ia3_parts(adapter: IA3, projection: Projection) -> tuple[Part, ...]:
    """The vector, of what peft calls a feed-forward module its inputs'."""
    return (Part("factor", "ia3_l", "1 I -> I" if writes(projection) else "O 1 -> O"),)


def ia3_config(adapter: IA3) -> dict[str, Any]:
    """No keys but those that name modules."""
    return {}


def ia3_of(theirs: Mapping[str, Any]) -> IA3:
    """Our IA3."""
    return IA3()


def loha_parts(adapter: LoHa, projection: Projection) -> tuple[Part, ...]:
    """The four factors."""
    down = (Part(f"a{i}", f"hada_w{i}_b", "r I -> I r") for i in (1, 2))
    up = (Part(f"b{i}", f"hada_w{i}_a", "O r -> r O") for i in (1, 2))
    return *down, *up


def loha_config(adapter: LoHa) -> dict[str, Any]:
    """The keys of LoHa."""
    return {"r": adapter.rank, "alpha": adapter.alpha}


def loha_of(theirs: Mapping[str, Any]) -> LoHa:
    """Our LoHa."""
    return LoHa(rank=theirs.get("r", 8), alpha=float(theirs.get("alpha", 8)))


def lokr_parts(adapter: LoKr, projection: Projection) -> tuple[Part, ...]:
    """C, and D or its factors."""
    (_, n), (_, k) = adapter.sides(projection)
    left = Part("c", "lokr_w1", "l m -> m l")
    if adapter.whole(n, k):
        return left, Part("d", "lokr_w2", "k n -> n k")
    return left, Part("a", "lokr_w2_b", "r n -> n r"), Part("b", "lokr_w2_a", "k r -> r k")


def lokr_config(adapter: LoKr) -> dict[str, Any]:
    """The keys of LoKr."""
    return {"r": adapter.rank, "alpha": adapter.alpha, "decompose_factor": adapter.factor}


def lokr_of(theirs: Mapping[str, Any]) -> LoKr:
    """Our LoKr."""
    factor = theirs.get("decompose_factor", -1)
    return LoKr(rank=theirs.get("r", 8), alpha=float(theirs.get("alpha", 8)), factor=factor)


def oft_parts(adapter: OFT, projection: Projection) -> tuple[Part, ...]:
    """The entries above the diagonals; peft's exact form turns the other way than its series."""
    return (Part("skew", "oft_R.weight", "b e -> b e", -1.0 if adapter.terms is None else 1.0),)


def oft_config(adapter: OFT) -> dict[str, Any]:
    """The keys of OFT."""
    series = {"num_cayley_neumann_terms": adapter.terms} if adapter.terms else {}
    return {
        "r": 0,
        "oft_block_size": adapter.block,
        "use_cayley_neumann": adapter.terms is not None,
        **series,
        "bias": "none",
    }


def oft_of(theirs: Mapping[str, Any]) -> OFT:
    """Our OFT; InputError where blocks are told by their number."""
    block = theirs.get("oft_block_size", 32)
    if not block:
        raise InputError("r is not read without oft_block_size: blocks are of one size")
    terms = theirs.get("num_cayley_neumann_terms", 5) if theirs.get("use_cayley_neumann", True) else None
    return OFT(block=block, terms=terms)


def boft_parts(adapter: BOFT, projection: Projection) -> tuple[Part, ...]:
    """The matrices of which peft takes the skew part with the other sign, and the scale."""
    axes = "factors blocks row column"
    return Part("skew", "boft_R", f"{axes} -> {axes}", -1.0), Part("scale", "boft_s", "O 1 -> O")


def boft_config(adapter: BOFT) -> dict[str, Any]:
    """The keys of BOFT."""
    return {
        "boft_block_size": adapter.block,
        "boft_block_num": 0,
        "boft_n_butterfly_factor": adapter.factors,
        "bias": "none",
    }


def boft_of(theirs: Mapping[str, Any]) -> BOFT:
    """Our BOFT; InputError where blocks are told by their number."""
    block = theirs.get("boft_block_size", 4)
    if not block:
        raise InputError("boft_block_num is not read without boft_block_size: blocks are of one size")
    return BOFT(block=block, factors=theirs.get("boft_n_butterfly_factor", 1))
