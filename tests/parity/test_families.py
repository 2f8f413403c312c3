"""Every family that generates text against transformers, live: logits, tensors there and back, the export, generation.

A family adds a line to CASES: a tiny config of transformers that covers what is special about it, and its rows.
"""

import copy

import jax
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file

from llmjax.decode.config import Generate
from llmjax.decode.generate import generate
from llmjax.models.families import FAMILIES
from llmjax.models.hf import load_hf, save_hf
from scripts.golden_models import inputs, random_model
from tests.evidence import evidence
from tests.kernels.simulated import simulated_tpu
from tests.models.golden import TOLERANCE, logits, relative_error

pytestmark = pytest.mark.parity

VOCAB = 61
PLAIN = {"vocab_size": VOCAB, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
SIZES = PLAIN | {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
GROUPED = SIZES | {"num_key_value_heads": 2}
GEMMA = GROUPED | {"head_dim": 12, "num_hidden_layers": 4}
STATES = PLAIN | {"hidden_size": 24, "num_hidden_layers": 2}
LLAMA31 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 16}
LINEAR = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.0, 1.5, 2.0, 4.0],
}
BOTH = {
    "full_attention": LINEAR | {"rope_theta": 1e6},
    "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
}
EXPERTS = GROUPED | {"num_experts_per_tok": 3, "moe_intermediate_size": 12, "num_experts": 8}
LATENT = SIZES | {
    "num_key_value_heads": 4,
    "q_lora_rank": 10,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "moe_intermediate_size": 12,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
}
DEEP_YARN = YARN | {"mscale": 0.707, "mscale_all_dim": 0.707}

CASES = {
    "gpt2": ("GPT2", PLAIN | dict(n_positions=64, n_embd=24, n_layer=2, n_head=3), "D01 gpt2"),
    "llama": ("Llama", GROUPED, "D05 llama"),
    "llama 3.1": ("Llama", GROUPED | dict(rope_parameters=LLAMA31, tie_word_embeddings=True), "D05 llama"),
    "llama yarn": ("Llama", GROUPED | dict(rope_parameters=YARN, head_dim=10), "D05 llama"),
    "llama linear": ("Llama", GROUPED | dict(rope_parameters=LINEAR), "D05 llama"),
    "mistral": ("Mistral", GROUPED | dict(sliding_window=5), "D06 mistral"),
    "mistral without window": ("Mistral", GROUPED | dict(sliding_window=None, head_dim=10), "D06 mistral"),
    "qwen2": ("Qwen2", GROUPED | dict(tie_word_embeddings=True), "D08 qwen2"),
    "qwen2 windowed": (
        "Qwen2",
        GROUPED | dict(use_sliding_window=True, sliding_window=5, max_window_layers=1),
        "D08 qwen2",
    ),
    "qwen3": ("Qwen3", GROUPED | dict(head_dim=10), "D16 qwen3"),
    "gemma 1": ("Gemma", GEMMA | dict(num_key_value_heads=1), "D16 gemma"),
    "gemma 2": ("Gemma2", GEMMA | dict(sliding_window=5, query_pre_attn_scalar=16), "D16 gemma"),
    "gemma 3": (
        "Gemma3Text",
        GEMMA | dict(num_hidden_layers=7, sliding_window=5, query_pre_attn_scalar=16, rope_parameters=BOTH),
        "D16 gemma",
    ),
    "phi3": ("Phi3", GROUPED | dict(sliding_window=5), "D16 phi3"),
    "phi3 partial": ("Phi3", GROUPED | dict(rope_parameters={"partial_rotary_factor": 0.75}), "D16 phi3"),
    "phi3 long": ("Phi3", GROUPED | dict(original_max_position_embeddings=8, rope_parameters=LONG), "D16 phi3"),
    "phi3 long, short factors": (
        "Phi3",
        GROUPED | dict(original_max_position_embeddings=64, max_position_embeddings=256, rope_parameters=LONG),
        "D16 phi3",
    ),
    "olmo2": ("Olmo2", GROUPED, "D16 olmo2"),
    "gpt-neox": ("GPTNeoX", SIZES, "D09 gpt_neox"),
    "gpt-neox in turn": (
        "GPTNeoX",
        SIZES | dict(use_parallel_residual=False, attention_bias=False, rotary_pct=1.0, hidden_act="gelu_new"),
        "D09 gpt_neox",
    ),
    "gptj": ("GPTJ", PLAIN | dict(n_positions=64, n_embd=32, n_layer=2, n_head=4, rotary_dim=4), "D09 gptj"),
    "bloom": ("Bloom", PLAIN | dict(hidden_size=24, n_layer=2, n_head=6), "D16 bloom"),
    "falcon 7B": ("Falcon", SIZES | dict(ffn_hidden_size=40), "D16 falcon"),
    "falcon 40B": ("Falcon", SIZES | dict(new_decoder_architecture=True, num_kv_heads=2), "D16 falcon"),
    "falcon of one norm": (
        "Falcon",
        SIZES | dict(new_decoder_architecture=True, num_kv_heads=2, num_ln_in_parallel_attn=1, bias=True),
        "D16 falcon",
    ),
    "falcon in turn": ("Falcon", SIZES | dict(multi_query=False, parallel_attn=False, bias=True), "D16 falcon"),
    "mixtral": ("Mixtral", GROUPED | dict(num_local_experts=4), "D07 mixtral"),
    "mixtral windowed": (
        "Mixtral",
        GROUPED | dict(num_local_experts=5, num_experts_per_tok=3, sliding_window=5, tie_word_embeddings=True),
        "D07 mixtral",
    ),
    "qwen3-moe": ("Qwen3Moe", EXPERTS | dict(head_dim=10, norm_topk_prob=True), "D16 qwen3_moe"),
    "qwen3-moe in places": (
        "Qwen3Moe",
        EXPERTS | dict(num_hidden_layers=5, decoder_sparse_step=2, mlp_only_layers=[1]),
        "D16 qwen3_moe",
    ),
    "deepseek-v2": (
        "DeepseekV2",
        LATENT | dict(topk_method="group_limited_greedy", n_group=4, topk_group=2, routed_scaling_factor=4.0),
        "D16 deepseek",
    ),
    "deepseek-v2 lite": ("DeepseekV2", LATENT | dict(q_lora_rank=None, rope_parameters=DEEP_YARN), "D16 deepseek"),
    "deepseek-v3": ("DeepseekV3", LATENT | dict(n_group=4, topk_group=2, num_hidden_layers=3), "D16 deepseek"),
    "deepseek-v3 yarn": (
        "DeepseekV3",
        LATENT | dict(n_group=1, topk_group=1, rope_interleave=False, rope_parameters=YARN | {"mscale_all_dim": 1.0}),
        "D16 deepseek",
    ),
    "gpt-oss": (
        "GptOss",
        GROUPED | dict(head_dim=10, num_local_experts=5, sliding_window=5, swiglu_limit=1.0),
        "D16 gpt_oss",
    ),
    "gpt-oss plain": (
        "GptOss",
        GROUPED | dict(num_local_experts=5, layer_types=["full_attention"] * 2, rope_parameters=LINEAR),
        "D16 gpt_oss",
    ),
    "mamba": ("Mamba", STATES | dict(state_size=4, time_step_rank=3), "D12 mamba"),
    "mamba of biases": (
        "Mamba",
        STATES | dict(use_bias=True, use_conv_bias=False, expand=1, conv_kernel=3, tie_word_embeddings=False),
        "D12 mamba",
    ),
    "mamba 2": ("Mamba2", STATES | dict(state_size=4, num_heads=6, head_dim=8, n_groups=1), "D13 mamba2"),
    "mamba 2 of groups": (
        "Mamba2",
        STATES | dict(state_size=4, num_heads=6, head_dim=8, n_groups=2, use_bias=True, tie_word_embeddings=True),
        "D13 mamba2",
    ),
    "recurrent gemma": (
        "RecurrentGemma",
        GROUPED | dict(num_hidden_layers=5, attention_window_size=5, lru_width=32),
        "D16 recurrent_gemma",
    ),
    "rwkv": (
        "Rwkv",
        PLAIN | dict(hidden_size=24, num_hidden_layers=2, intermediate_size=40),
        "D16 rwkv",
    ),
    "bamba": (
        "Bamba",
        GROUPED | dict(num_hidden_layers=3, attn_layer_indices=[1], mamba_n_heads=8, mamba_d_state=4),
        "D16 bamba",
    ),
}
"""name: class of config without `Config`, its fields, catalogue row and module of our family"""
MIXES_ROWS = ("Rwkv",)
"""models of transformers that with a cache give a batch's rows each other's states: theirs is generated without"""


@pytest.fixture(autouse=True)
def one_thread():
    """Sums in one order: the machine's cores are shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def marks(name, kind, case):
    row, module = case.split()
    oracle = f"transformers {kind}: {name}, logits, exported tensors and greedy tokens"
    return evidence(row, oracle=oracle, code=f"llmjax.models.{module}")


@pytest.mark.parametrize(
    ("kind", "fields"),
    [pytest.param(kind, fields, id=name, marks=marks(name, kind, row)) for name, (kind, fields, row) in CASES.items()],
)
def test_family(kind, fields, tmp_path, evidence):
    theirs = random_model(getattr(transformers, f"{kind}Config")(**copy.deepcopy(fields)), seed=3)
    theirs.save_pretrained(tmp_path / "theirs")
    config, params = load_hf(tmp_path / "theirs")
    tokens, _ = inputs(VOCAB, seed=3)
    with torch.no_grad():
        expected = theirs(input_ids=tokens).logits.numpy()
    evidence.record(relative_error(logits(config, params, tokens.numpy()), expected), TOLERANCE)

    save_hf(tmp_path / "ours", config, params, family=FAMILIES[theirs.config.model_type])
    original, written = (load_file(tmp_path / side / "model.safetensors") for side in ("theirs", "ours"))
    assert original.keys() == written.keys()
    assert all(original[name].tobytes() == written[name].tobytes() for name in original)
    again, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", attn_implementation="eager", output_loading_info=True
    )
    assert not any(info[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        assert relative_error(again.eval()(input_ids=tokens).logits.numpy(), expected) < 1e-6

    greedy = theirs.generate(
        tokens[:, :9],
        do_sample=False,
        max_new_tokens=32,
        attention_mask=torch.ones(2, 9),
        use_cache=kind not in MIXES_ROWS,
    )
    mine = generate(Generate(max_tokens=32, temperature=0.0), config, params, tokens[:, :9].tolist())
    np.testing.assert_array_equal(mine.tokens, greedy[:, 9:].numpy())


def on_a_tpu(name, row, code):
    kind, fields, _ = CASES[name]
    oracle = f"transformers {kind}: {name}, logits, by kernels for TPUs in simulation"
    return pytest.param(kind, fields, id=name, marks=evidence(row, oracle=oracle, code=f"pallas_kernels.{code}"))


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        on_a_tpu("mamba", "C09", "selective_scan.tpu"),
        on_a_tpu("mamba of biases", "C09", "selective_scan.tpu"),
        on_a_tpu("mamba 2", "C10", "gated_linear_attention.tpu"),
        on_a_tpu("mamba 2 of groups", "C10", "gated_linear_attention.tpu"),
    ],
)
def test_scans_run_as_kernels(kind, fields, tmp_path, evidence):
    theirs = random_model(getattr(transformers, f"{kind}Config")(**copy.deepcopy(fields)), seed=3)
    theirs.save_pretrained(tmp_path)
    config, params = load_hf(tmp_path)
    tokens, _ = inputs(VOCAB, seed=3)
    with torch.no_grad():
        expected = theirs(input_ids=tokens).logits.numpy()
    with simulated_tpu():
        traced = jax.jit(lambda params: logits.__wrapped__(config, params, tokens.numpy())).trace(params)
        assert "pallas_call" in str(traced.jaxpr)
        ours = traced.lower().compile()(params)
    evidence.record(relative_error(ours, expected), TOLERANCE)
