"""Adapters as folders of the library peft (Mangrulkar et al. 2022), in and out.

Where one module of theirs is several projections of ours (GPT-2's c_attn), what is shared is copied to each; if it has
become different, the module is written with the ranks of all of them, which is the same function.
"""

from llmjax.adapters.peft.read import load_peft
from llmjax.adapters.peft.write import save_peft

__all__ = ["load_peft", "save_peft"]
