"""The published shapes: parameter counts to the last parameter, without memory, and the errors of the presets."""

import time

import jax
import pytest

from llmjax.config import InputError, validate
from llmjax.models.bloom import bloom
from llmjax.models.falcon import falcon
from llmjax.models.gemma import gemma1, gemma2, gemma3
from llmjax.models.gpt2 import gpt2
from llmjax.models.gpt3 import gpt3
from llmjax.models.gpt_neox import gpt_neox
from llmjax.models.gptj import gptj
from llmjax.models.llama import llama1, llama2, llama3, llama31, llama32
from llmjax.models.mistral import mistral
from llmjax.models.olmo2 import olmo2
from llmjax.models.phi3 import phi3
from llmjax.models.qwen2 import qwen2
from llmjax.models.qwen3 import qwen3
from tests.evidence import evidence

PUBLISHED = {
    "gpt2-124M": (gpt2, "124M", 124_439_808),
    "gpt2-355M": (gpt2, "355M", 354_823_168),
    "gpt2-774M": (gpt2, "774M", 774_030_080),
    "gpt2-1558M": (gpt2, "1558M", 1_557_611_200),
    "gpt3-175B": (gpt3, "175B", 174_604_259_328),
    "llama1-7B": (llama1, "7B", 6_738_415_616),
    "llama1-13B": (llama1, "13B", 13_015_864_320),
    "llama1-33B": (llama1, "33B", 32_528_943_616),
    "llama1-65B": (llama1, "65B", 65_285_660_672),
    "llama2-7B": (llama2, "7B", 6_738_415_616),
    "llama2-13B": (llama2, "13B", 13_015_864_320),
    "llama2-70B": (llama2, "70B", 68_976_648_192),
    "llama3-8B": (llama3, "8B", 8_030_261_248),
    "llama3-70B": (llama3, "70B", 70_553_706_496),
    "llama31-405B": (llama31, "405B", 405_853_388_800),
    "llama32-1B": (llama32, "1B", 1_235_814_400),
    "llama32-3B": (llama32, "3B", 3_212_749_824),
    "mistral-7B": (mistral, "7B", 7_241_732_096),
    "mistral-7B-v0.3": (mistral, "7B-v0.3", 7_248_023_552),
    "qwen2-0.5B": (qwen2, "0.5B", 494_032_768),
    "qwen2-1.5B": (qwen2, "1.5B", 1_543_714_304),
    "qwen2-7B": (qwen2, "7B", 7_615_616_512),
    "qwen2-72B": (qwen2, "72B", 72_706_203_648),
    "qwen3-4B": (qwen3, "4B", 4_022_468_096),
    "qwen3-8B": (qwen3, "8B", 8_190_735_360),
    "qwen3-14B": (qwen3, "14B", 14_768_307_200),
    "qwen3-32B": (qwen3, "32B", 32_762_123_264),
    "gemma1-2B": (gemma1, "2B", 2_506_172_416),
    "gemma1-7B": (gemma1, "7B", 8_537_680_896),
    "gemma2-2B": (gemma2, "2B", 2_614_341_888),
    "gemma2-9B": (gemma2, "9B", 9_241_705_984),
    "gemma2-27B": (gemma2, "27B", 27_227_128_320),
    "gemma3-270M": (gemma3, "270M", 268_098_176),
    "gemma3-1B": (gemma3, "1B", 999_885_952),
    "phi3-mini": (phi3, "mini", 3_821_079_552),
    "phi3-medium": (phi3, "medium", 13_960_238_080),
    "olmo2-1B": (olmo2, "1B", 1_484_916_736),
    "olmo2-7B": (olmo2, "7B", 7_298_617_344),
    "olmo2-13B": (olmo2, "13B", 13_716_198_400),
    "pythia-70M": (gpt_neox, "70M", 70_426_624),
    "pythia-160M": (gpt_neox, "160M", 162_322_944),
    "pythia-410M": (gpt_neox, "410M", 405_334_016),
    "pythia-1B": (gpt_neox, "1B", 1_011_781_632),
    "pythia-1.4B": (gpt_neox, "1.4B", 1_414_647_808),
    "pythia-2.8B": (gpt_neox, "2.8B", 2_775_208_960),
    "pythia-6.9B": (gpt_neox, "6.9B", 6_857_302_016),
    "pythia-12B": (gpt_neox, "12B", 11_846_072_320),
    "neox-20B": (gpt_neox, "20B", 20_554_567_680),
    "gptj-6B": (gptj, "6B", 6_050_882_784),
    "bloom-560M": (bloom, "560M", 559_214_592),
    "bloom-1.1B": (bloom, "1.1B", 1_065_314_304),
    "bloom-1.7B": (bloom, "1.7B", 1_722_408_960),
    "bloom-3B": (bloom, "3B", 3_002_557_440),
    "bloom-7.1B": (bloom, "7.1B", 7_069_016_064),
    "bloom-176B": (bloom, "176B", 176_247_271_424),
    "falcon-7B": (falcon, "7B", 6_921_720_704),
    "falcon-40B": (falcon, "40B", 41_303_293_952),
}
ROW = {
    "gpt2": "D01",
    "gpt3": "D03",
    "llama1": "D04",
    "llama2": "D05",
    "llama3": "D05",
    "llama31": "D05",
    "llama32": "D05",
}
ROW |= {"mistral": "D06", "qwen2": "D08", "pythia": "D09", "neox": "D09", "gptj": "D09"}
SMALL = {"18M": (6, 256, 128, 17_637_632), "30M": (6, 384, 1024, 30_339_456)}


def marks(name, preset):
    """The row of its family; of each preset function the first size is in the quick suite."""
    row, first = ROW.get(name.partition("-")[0], "D16"), next(n for n in PUBLISHED if PUBLISHED[n][0] is preset)
    found = [evidence(row, oracle="published parameter counts", code=preset.__module__)]
    return found if name == first else [*found, pytest.mark.matrix]


@evidence("D18", oracle="published parameter counts", code="llmjax.nn.model.Model.num_params")
@pytest.mark.parametrize(
    ("preset", "size", "count"),
    [pytest.param(*case, marks=marks(name, case[0]), id=name) for name, case in PUBLISHED.items()],
)
def test_published_counts(preset, size, count, evidence):
    config = preset(size)
    validate(config)
    start = time.process_time()
    evidence.record(abs(config.num_params() - count), 0)
    assert time.process_time() - start < 60, "counting must not make arrays: 70B of them would take far longer"


@evidence("D02", oracle="V d + P d + L (12 d^2 + 13 d) + 2 d", code="llmjax.models.gpt2")
@pytest.mark.parametrize("size", list(SMALL))
def test_demonstration_sizes(size, evidence):
    layers, d, length, count = SMALL[size]
    assert 50257 * d + length * d + layers * (12 * d * d + 13 * d) + 2 * d == count
    evidence.record(abs(gpt2(size).num_params() - count), 0)


@pytest.mark.parametrize(
    "preset", [gpt2, gpt3, llama1, mistral, qwen2, qwen3, gemma1, phi3, olmo2, gpt_neox, gptj, bloom, falcon]
)
def test_unknown_size_names_the_known(preset):
    with pytest.raises(InputError, match=r"unknown .* size '2K': use "):
        preset("2K")


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
