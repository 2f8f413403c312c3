"""Rotary positions in a config.json: `rope_parameters` since transformers 5, `rope_theta` and `rope_scaling` before."""

import math
from collections.abc import Mapping
from typing import Any, Literal

from llmjax.config import InputError
from llmjax.models.settings import mapping_of, setting
from llmjax.nn.rope import Rope
from llmjax.nn.rope_scaling import Llama3, LongRoPE, PositionInterpolation, RopeScaling, YaRN

ORIGINAL = "original_max_position_embeddings"


def rope_of(theirs: Mapping[str, Any], **defaults: Any) -> Rope:
    """Our config of the one rotation of a model; `defaults` are those of `Rope` where the family has others."""
    given = {**mapping_of(theirs, "rope_scaling"), **mapping_of(theirs, "rope_parameters")}
    usual = Rope(**defaults)
    outside = {key: theirs[key] for key in (ORIGINAL, "max_position_embeddings") if key in theirs}
    return rotation(
        {
            "rope_theta": setting(theirs, "rope_theta", usual.base),
            "partial_rotary_factor": setting(theirs, "partial_rotary_factor", usual.fraction),
            **outside,
            **given,
        },
        usual,
    )


def rotation(given: Mapping[str, Any], usual: Rope) -> Rope:
    """Our config of one rotation that `given` describes, `usual` where it says nothing."""
    return Rope(
        base=setting(given, "rope_theta", usual.base),
        layout=usual.layout,
        fraction=setting(given, "partial_rotary_factor", usual.fraction),
        scaling=_scaling(given),
    )


def _scaling(given: Mapping[str, Any]) -> RopeScaling | None:
    kind = given.get("rope_type", given.get("type", "default"))
    factor = setting(given, "factor", 1.0)
    original = setting(given, ORIGINAL, setting(given, "max_position_embeddings", 2048))
    if kind == "default":
        return None
    if kind in ("linear", "llama3", "yarn") and given.get("factor") is None:
        raise InputError(f"config.json: rope_type={kind!r} lacks its factor")
    if kind == "linear":
        return PositionInterpolation(factor)
    if kind == "llama3":
        return Llama3(factor, setting(given, "low_freq_factor", 1.0), setting(given, "high_freq_factor", 4.0), original)
    if kind == "yarn":
        betas = setting(given, "beta_fast", 32.0), setting(given, "beta_slow", 1.0)
        ramp: Literal["code", "exact"] = "code" if setting(given, "truncate", True) else "exact"
        return YaRN(factor, original, *betas, ramp, _magnitude(given, factor))
    if kind in ("longrope", "su"):
        short, long = (_numbers(given, key) for key in ("short_factor", "long_factor"))
        longest = setting(given, "max_position_embeddings", round(factor * original))
        return LongRoPE(short, long, longest / original, original)
    known = "default, linear, llama3, yarn and longrope"
    raise InputError(f"config.json: rope_type={kind!r} is not supported: {known} are")


def _magnitude(given: Mapping[str, Any], factor: float) -> float | None:
    """What YaRN multiplies queries and keys by: given, or the quotient of DeepSeek's two scales, or the paper's."""
    if given.get("attention_factor") is not None:
        return setting(given, "attention_factor", 1.0)
    one, all_dim = setting(given, "mscale", 0.0), setting(given, "mscale_all_dim", 0.0)
    if not (one and all_dim):
        return None
    return (0.1 * one * math.log(factor) + 1) / (0.1 * all_dim * math.log(factor) + 1)


def _numbers(given: Mapping[str, Any], key: str) -> tuple[float, ...]:
    value = given.get(key)
    if not isinstance(value, list) or not all(type(x) in (int, float) for x in value):
        raise InputError(f"config.json: {key}={value!r}: expected a list of numbers")
    return tuple(map(float, value))


def rope_settings(rope: Rope | None) -> dict[str, Any]:
    """The keys of a config.json that say `rope`, of old and new versions; the usual ones where there is none."""
    parameters = parameters_of(rope or Rope())
    old = {key: parameters[key] for key in ("rope_theta", "partial_rotary_factor") if key in parameters}
    scaled = parameters["rope_type"] != "default"
    return old | {"rope_parameters": parameters} | ({"rope_scaling": parameters} if scaled else {})


def parameters_of(rope: Rope) -> dict[str, Any]:
    """One entry of `rope_parameters`."""
    plain = {"rope_theta": rope.base}
    plain |= {} if rope.fraction == 1 else {"partial_rotary_factor": rope.fraction}
    match rope.scaling:
        case None:
            return {"rope_type": "default", **plain}
        case PositionInterpolation(factor):
            own: dict[str, Any] = {"rope_type": "linear", "factor": factor}
        case Llama3(factor, low, high, length):
            own = {"rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high}
            own |= {ORIGINAL: length}
        case YaRN(factor, length, fast, slow, "code" | "exact" as ramp, magnitude):
            own = {"rope_type": "yarn", "factor": factor, ORIGINAL: length, "beta_fast": fast, "beta_slow": slow}
            own |= {} if ramp == "code" else {"truncate": False}
            own |= {} if magnitude is None else {"attention_factor": magnitude}
        case LongRoPE(short, long, factor, length):
            own = {"rope_type": "longrope", "short_factor": list(short), "long_factor": list(long)}
            own |= {"factor": factor, ORIGINAL: length}
        case other:
            raise InputError(f"scaling={other} cannot be said in a config.json")
    return {**own, **plain}
