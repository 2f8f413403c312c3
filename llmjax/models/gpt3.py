"""GPT-3: GPT-2 with every other layer's attention banded. Brown et al. 2020 (2005.14165), section 2.1, table 2.1.

It was never released, so there is nothing to import and no `model_type`: these are shapes to train.
"""

from dataclasses import replace
from typing import Literal

from llmjax.config import InputError
from llmjax.models.gpt2 import gpt2
from llmjax.nn.attention import Attention
from llmjax.nn.decoder import Decoder
from llmjax.nn.masks import Full, Window
from llmjax.nn.positions import LearnedPositions

Size = Literal["125M", "350M", "760M", "2.7B", "6.7B", "175B"]

SIZES: dict[str, tuple[int, int, int]] = {
    "125M": (12, 768, 12),
    "350M": (24, 1024, 16),
    "760M": (24, 1536, 16),
    "2.7B": (32, 2560, 32),
    "6.7B": (32, 4096, 32),
    "175B": (96, 12288, 96),
}
"""layers, d_model, heads; 1.3B and 13B are left out, whose heads times head_dim are not their d_model in the table"""


def gpt3(size: Size = "175B", band: int = 256) -> Decoder:
    """The config of a GPT-3 model of 2048 positions: dense layers 0, 2, ..., banded layers 1, 3, ...

    Banded layers see the last `band` tokens (the paper does not say how many). Raises InputError for an unknown size.
    """
    if size not in SIZES:
        raise InputError(f"unknown GPT-3 size {size!r}: use {', '.join(SIZES)}")
    layers, d_model, heads = SIZES[size]
    base = gpt2("124M")
    dense, banded = (
        replace(base.pattern[0], mixer=Attention(heads=heads, rope=None, bias=True, out_bias=True, mask=mask))
        for mask in (Full(), Window(band))
    )
    return replace(base, d_model=d_model, layers=layers, pattern=(dense, banded), positions=LearnedPositions(2048))
