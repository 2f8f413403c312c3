"""Write the golden files of tests/models: tiny random models of transformers with their logits, loss and gradients.

Run where torch and transformers are installed: `python -m scripts.golden_models [FOLDER]`. The same versions write the
same bytes. Each folder holds what `save_pretrained` wrote (config.json, model.safetensors) and expected.safetensors:
tokens, labels (-100 where no loss is asked for), logits, loss, and `grad.<tensor>` of the loss for every parameter.
Of the families in PARTS, each of which has parts that no other has, there are tokens and logits alone.
"""

import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.numpy import save_file

FOLDER = Path(__file__).resolve().parent.parent / "tests" / "models" / "golden"
GPT2 = transformers.GPT2Config(
    vocab_size=61,
    n_positions=24,
    n_embd=24,
    n_layer=2,
    n_head=3,
    resid_pdrop=0.0,
    embd_pdrop=0.0,
    attn_pdrop=0.0,
    bos_token_id=None,
    eos_token_id=None,
)
LLAMA = transformers.LlamaConfig(
    vocab_size=61,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    bos_token_id=None,
    eos_token_id=None,
)
SIZES = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 16}
PARTS = {
    "gemma2": transformers.Gemma2Config(
        **SIZES, num_key_value_heads=1, head_dim=8, sliding_window=5, query_pre_attn_scalar=16
    ),
    "olmo2": transformers.Olmo2Config(**SIZES),
    "gpt_neox": transformers.GPTNeoXConfig(**SIZES),
    "gptj": transformers.GPTJConfig(
        vocab_size=61,
        n_positions=64,
        n_embd=16,
        n_layer=2,
        n_head=2,
        rotary_dim=4,
        bos_token_id=None,
        eos_token_id=None,
    ),
    "deepseek_v3": transformers.DeepseekV3Config(
        **SIZES,
        num_key_value_heads=2,
        q_lora_rank=6,
        kv_lora_rank=8,
        qk_nope_head_dim=6,
        qk_rope_head_dim=4,
        v_head_dim=5,
        moe_intermediate_size=8,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        rope_parameters={**YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
    ),
    "gpt_oss": transformers.GptOssConfig(
        **SIZES,
        num_key_value_heads=1,
        head_dim=10,
        num_local_experts=3,
        num_experts_per_tok=2,
        sliding_window=5,
        swiglu_limit=1.0,
    ),
}
"""norms around branches, windows and caps; norms after them; two norms side by side; pairs of neighbours, head bias;
latent attention, dense layers before those with groups of experts; sinks and experts with biases"""


def random_model(config: transformers.PretrainedConfig, seed: int) -> transformers.PreTrainedModel:
    """A float32 model whose every parameter, biases and norms included, is random and large enough to matter.

    At the libraries' own initial values attention is all but uniform and biases are zero: errors would not show.
    """
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        biases = [buffer for name, buffer in model.named_buffers() if name.endswith("e_score_correction_bias")]
        for parameter in [*model.parameters(), *biases]:
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
            else:
                parameter.copy_(torch.randn_like(parameter) * 1.5 / parameter.shape[-1] ** 0.5)
    return model


def run(model: transformers.PreTrainedModel, tokens: torch.Tensor, labels: torch.Tensor) -> dict[str, np.ndarray]:
    """Logits, loss and the gradient of the loss for every parameter."""
    model.zero_grad()
    output = model(input_ids=tokens, labels=labels)
    output.loss.backward()
    results = {
        "tokens": tokens.numpy().astype(np.int32),
        "labels": labels.numpy().astype(np.int32),
        "logits": output.logits.detach().numpy(),
        "loss": output.loss.detach().numpy(),
    }
    return results | {f"grad.{name}": p.grad.numpy() for name, p in model.named_parameters()}


def inputs(vocab: int, batch: int = 2, length: int = 20, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Random tokens, and labels with a stretch that no loss is asked for."""
    tokens = torch.from_numpy(np.random.default_rng(seed).integers(0, vocab, (batch, length)))
    labels = tokens.clone()
    labels[0, 3:7] = -100
    return tokens, labels


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER
    for seed, (name, config) in enumerate({"gpt2": GPT2, "llama": LLAMA, **PARTS}.items()):
        model = random_model(config, seed)
        model.save_pretrained(folder / name)
        (folder / name / "generation_config.json").unlink(missing_ok=True)
        tokens, labels = inputs(config.vocab_size, seed=seed)
        results = run(model, tokens, labels)
        kept = {key: results[key] for key in ("tokens", "logits")} if name in PARTS else results
        save_file(kept, folder / name / "expected.safetensors")
        for file in (folder / name).iterdir():
            file.chmod(0o644)


if __name__ == "__main__":
    main()
