"""The published shapes: parameter counts to the last parameter, without memory, and the errors of the presets."""

import time

import jax
import pytest

from llmjax.config import InputError, validate
from llmjax.models.gpt2 import gpt2
from llmjax.models.llama import llama1, llama2, llama3
from tests.evidence import evidence

PUBLISHED = {
    "gpt2-124M": (gpt2, "124M", 124_439_808),
    "gpt2-355M": (gpt2, "355M", 354_823_168),
    "gpt2-774M": (gpt2, "774M", 774_030_080),
    "gpt2-1558M": (gpt2, "1558M", 1_557_611_200),
    "llama1-7B": (llama1, "7B", 6_738_415_616),
    "llama1-13B": (llama1, "13B", 13_015_864_320),
    "llama1-33B": (llama1, "33B", 32_528_943_616),
    "llama1-65B": (llama1, "65B", 65_285_660_672),
    "llama2-7B": (llama2, "7B", 6_738_415_616),
    "llama2-13B": (llama2, "13B", 13_015_864_320),
    "llama2-70B": (llama2, "70B", 68_976_648_192),
    "llama3-8B": (llama3, "8B", 8_030_261_248),
    "llama3-70B": (llama3, "70B", 70_553_706_496),
}
ROW = {"gpt2": "D01", "llama1": "D04", "llama2": "D05", "llama3": "D05"}
SMALL = {"18M": (6, 256, 128, 17_637_632), "30M": (6, 384, 1024, 30_339_456)}


@evidence("D18", oracle="published parameter counts", code="llmjax.nn.model.Model.num_params")
@pytest.mark.parametrize(
    ("preset", "size", "count"),
    [
        pytest.param(*case, marks=evidence(row, oracle="published parameter counts", code=code), id=name)
        for name, case in PUBLISHED.items()
        for row, code in [(ROW[name.partition("-")[0]], f"llmjax.models.{case[0].__module__.rpartition('.')[2]}")]
    ],
)
def test_published_counts(preset, size, count, evidence):
    config = preset(size)
    validate(config)
    start = time.perf_counter()
    evidence.record(abs(config.num_params() - count), 0)
    assert time.perf_counter() - start < 20, "counting must not make arrays: 70B of them would take far longer"


@evidence("D02", oracle="V d + P d + L (12 d^2 + 13 d) + 2 d", code="llmjax.models.gpt2")
@pytest.mark.parametrize("size", list(SMALL))
def test_demonstration_sizes(size, evidence):
    layers, d, length, count = SMALL[size]
    assert 50257 * d + length * d + layers * (12 * d * d + 13 * d) + 2 * d == count
    evidence.record(abs(gpt2(size).num_params() - count), 0)


@pytest.mark.parametrize("preset", [gpt2, llama1, llama2, llama3])
def test_unknown_size_names_the_known(preset):
    with pytest.raises(InputError, match=r"unknown .* size '3B': use .*M|unknown .* size '3B': use .*B"):
        preset("3B")


def test_matmul_weights_are_all_but_tables_norms_and_biases():
    """FLOPs per token at length 0 attention are 6 a weight that multiplies: count those in the tree itself."""
    config = llama3("8B")
    kernels = [
        leaf.size for path, leaf in jax.tree_util.tree_leaves_with_path(config.abstract()) if path[-1].key == "kernel"
    ]
    mixing = config.layers * config.pattern[0].mixer.mixing_flops(config.d_model, 1)
    assert config.flops_per_token(1) == 6 * sum(kernels) + 3 * mixing


def test_cache_bytes_of_grouped_queries():
    """Llama 2 70B: 8 of 64 heads, 2 tensors of 128 features, 80 layers, 2 bytes: 320 KiB a token."""
    assert llama2("70B").kv_bytes_per_token("bfloat16") == 2 * 8 * 128 * 80 * 2 == 327_680
