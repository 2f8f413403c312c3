"""All families, one line each: what model folders are read and written by."""

from llmjax.config import InputError
from llmjax.models import (
    bamba,
    bert,
    bloom,
    clip,
    deepseek,
    falcon,
    gemma,
    gpt2,
    gpt_neox,
    gpt_oss,
    gptj,
    llama,
    mamba,
    mamba2,
    mistral,
    mixtral,
    olmo2,
    phi3,
    qwen2,
    qwen3,
    qwen3_moe,
    recurrent_gemma,
    rwkv,
    t5,
    vit,
)
from llmjax.models.mapping import Family
from llmjax.nn.model import Model

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        gpt2.FAMILY,
        llama.FAMILY,
        mistral.FAMILY,
        qwen2.FAMILY,
        qwen3.FAMILY,
        gemma.FAMILY1,
        gemma.FAMILY2,
        gemma.FAMILY3,
        phi3.FAMILY,
        olmo2.FAMILY,
        gpt_neox.FAMILY,
        gptj.FAMILY,
        bloom.FAMILY,
        falcon.FAMILY,
        mixtral.FAMILY,
        qwen3_moe.FAMILY,
        deepseek.FAMILY2,
        deepseek.FAMILY3,
        gpt_oss.FAMILY,
        mamba.FAMILY,
        mamba2.FAMILY,
        recurrent_gemma.FAMILY,
        rwkv.FAMILY,
        bamba.FAMILY,
        bert.FAMILY,
        t5.FAMILY,
        vit.FAMILY,
        clip.FAMILY,
    )
}
"""by model_type; a config that several can express is written as the first of them"""


def family_of(config: Model) -> Family:
    """The first family whose config.json can say what `config` holds; else InputError with each family's reason."""
    reasons = {}
    for name, family in FAMILIES.items():
        try:
            family.to_hf_config(config)
            return family
        except InputError as error:
            reasons[name] = str(error)
    told = "; ".join(dict.fromkeys(reasons.values()))
    raise InputError(f"no family of transformers that is written fits: {told}")
