"""LoRA+: B learns faster than A. Hayou et al. 2024 (2402.12354)."""

from llmjax.train.optimizers.base import Group


def lora_plus(ratio: float = 16.0) -> Group:
    """The group of every low-rank adapter's B, with `ratio` times the learning rate.

    With one rate for both, features of a wide model are learned inefficiently: A's inputs are as many as the model is
    wide, B's as the rank. Any optimizer takes it: `AdamW(groups=(lora_plus(),))`.
    """
    return Group(path=r"(^|/)adapters/[^/]+/b$", learning_rate=ratio)
