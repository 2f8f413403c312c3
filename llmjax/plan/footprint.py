"""Bytes of training by formula, for models that no experiment describes yet; `llmjax show` counts those that one does.

State, a parameter: float32 weights 4, gradient 4, Adam's moments 8 (Rajbhandari et al. 2019, 1910.02054). What is
frozen is weights alone: 2 in bfloat16; in NF4 4 bits, one scale of 8 bits for 64 of them and one of 32 bits for 256
scales (Dettmers et al. 2023, 2305.14314). Activations come on top.
"""

from collections.abc import Mapping

TRAINED = 16.0
FROZEN = 2.0
NF4 = (4 + 8 / 64 + 32 / (64 * 256)) / 8
"""Bytes a weight of a linear layer."""


def full(params: float) -> float:
    """Every parameter is trained."""
    return TRAINED * params


def lora(params: float, adapters: float) -> float:
    """Frozen weights in bfloat16 and trained adapters (Hu et al. 2021, 2106.09685)."""
    return FROZEN * params + TRAINED * adapters


def qlora(linear: float, rest: float, adapters: float) -> float:
    """Linear layers in NF4, what else is frozen in bfloat16, and trained adapters."""
    return NF4 * linear + FROZEN * rest + TRAINED * adapters


def rlhf(policy: float, value: float, reward: float) -> float:
    """PPO's four models: policy and value are trained, the policy's reference and the reward model frozen."""
    return TRAINED * (policy + value) + FROZEN * (policy + reward)


def distillation(teacher: float, student: float) -> float:
    """A frozen teacher and a trained student."""
    return FROZEN * teacher + TRAINED * student


def adapters(shapes: Mapping[str, tuple[int, int]], rank: int) -> int:
    """Parameters of LoRA of this rank on matrices of these shapes: sum of rank (inputs + outputs)."""
    return sum(rank * (inputs + outputs) for inputs, outputs in shapes.values())


def activations(length: int, rows: int, d_model: int, heads: int, layers: int, scores: bool = True) -> float:
    """Bytes that a GPT's backward pass needs in 16 bit: L s b h (34 + 5 a s / h) (Korthikanti et al. 2022, 2205.05198).

    Without `scores` the second term is gone: attention that keeps no `[length, length]`.
    """
    return layers * length * rows * d_model * (34 + (5 * heads * length / d_model if scores else 0))
