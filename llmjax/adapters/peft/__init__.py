"""Adapters as folders of the library peft (Mangrulkar et al. 2022), in and out.

Where one module of theirs is several projections of ours (GPT-2's c_attn), what is shared is copied to each; if it has
become different, LoRA's module is written with the ranks of all of them, which is the same function. Of other methods,
what is no adapter of the whole module is refused.

PiSSA and OLoRA are written for the base as it was before they moved a part out of it: peft moves that part again when
it loads them, and so does `load_peft`. What a network wrote (P-tuning, a prefix) is written without the network.
"""

from llmjax.adapters.peft.read import load_peft
from llmjax.adapters.peft.write import save_peft

__all__ = ["load_peft", "save_peft"]
