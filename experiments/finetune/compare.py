"""A small model of Python's documentation learns Python's code: every way to fine-tune it, on one task.

What:   the quickstart's model (3.7M parameters), exported and read like anybody's checkpoint, goes on with top-level
        functions and classes of the standard library, one a row, by full fine-tuning, LoRA and its relatives, QLoRA,
        bottlenecks, IA3, norms alone, prompts and prefixes. One seed, learning rates not searched.
Cost:   a minute or two a variant on 2 CPU cores; `python -m scripts.compare_finetuning` runs all of them.
Expect: docs/finetuning.md, which holds what was measured: bits per byte, trainable parameters, bytes.
Run:    llmjax train experiments/quickstart.py --run-dir=runs/base
        llmjax export runs/base models/base
        llmjax train experiments/finetune/compare.py:qlora --run-dir=runs/qlora
        llmjax export runs/qlora models/qlora
"""

import os
from dataclasses import replace
from pathlib import Path

from llmjax.adapters import Adapted, Adapter, LoRA
from llmjax.adapters.bottleneck import Bottleneck
from llmjax.adapters.dora import DoRA
from llmjax.adapters.ia3 import IA3
from llmjax.adapters.pissa import PiSSA
from llmjax.adapters.prefix import PrefixTuning
from llmjax.adapters.prompt import PromptTuning
from llmjax.adapters.vera import VeRA
from llmjax.data import Bytes, Data, Padded, TextFiles, TokenizerJson
from llmjax.decode.config import Generate
from llmjax.experiment import Experiment
from llmjax.models.pretrained import FromPretrained
from llmjax.nn.attention import Attention
from llmjax.nn.block import Block
from llmjax.nn.decoder import Decoder
from llmjax.nn.mlp import GLU
from llmjax.nn.model import Model
from llmjax.quant.quantised import Quantised
from llmjax.quant.quantize import Quantize
from llmjax.train.config import Train
from llmjax.train.optimizers import AdamW
from llmjax.train.schedules import Cosine

BASE = "models/base"
CODE = str(Path(os.__file__).parent / "[a-h]*.py")
"""modules of the standard library"""
SMALL = Decoder(vocab=257, d_model=64, layers=1, pattern=(Block(mixer=Attention(heads=2), mlp=GLU()),))


def experiment() -> Experiment:
    """LoRA of rank 8 on all linear layers."""
    return _adapted("lora", LoRA(rank=8), 3e-3)


def _tuned(name: str, model: Model, learning_rate: float) -> Experiment:
    """200 updates of 8 rows of at most 128 tokens."""
    return Experiment(
        name=name,
        model=model,
        data=Data(
            source=TextFiles(path=CODE, separator="\n\n\n", holdout=0.1),
            tokenizer=TokenizerJson(path=f"{BASE}/tokenizer.json"),
            packing=Padded(),
            length=128,
            batch_size=8,
        ),
        optimizer=AdamW(schedule=Cosine(learning_rate=learning_rate, warmup=20), weight_decay=0.0),
        train=Train(steps=200, log_every=20, eval_every=50, eval_batches=40, checkpoint_every=200, keep_best=0),
        generate=Generate(prompt="def read(self", max_tokens=64, temperature=0.0),
    )


def _base() -> Model:
    """The exported model, and what it is without being asked."""
    block = Block(mixer=Attention(heads=4), mlp=GLU())
    return FromPretrained(BASE, base=Decoder(vocab=2048, d_model=256, layers=4, pattern=(block,), tied=True))


def _adapted(name: str, adapter: Adapter, learning_rate: float) -> Experiment:
    """The base with one adapter."""
    return _tuned(name, Adapted(base=_base(), adapters=(adapter,)), learning_rate)


def full() -> Experiment:
    """All parameters."""
    return _tuned("full", _base(), 1e-3)


def qlora() -> Experiment:
    """LoRA of rank 8 on a base in NF4, its scales in 8 bits."""
    model = Adapted(base=Quantised(base=_base(), quantize=Quantize()), adapters=(LoRA(rank=8),))
    return _tuned("qlora", model, 3e-3)


def dora() -> Experiment:
    """DoRA of rank 8."""
    return _adapted("dora", DoRA(rank=8), 3e-3)


def pissa() -> Experiment:
    """PiSSA of rank 8: LoRA that starts from the largest singular vectors."""
    return _adapted("pissa", PiSSA(rank=8), 1e-3)


def vera() -> Experiment:
    """VeRA of rank 64."""
    return _adapted("vera", VeRA(rank=64), 3e-2)


def ia3() -> Experiment:
    """IA3."""
    return _adapted("ia3", IA3(), 3e-2)


def bottleneck() -> Experiment:
    """Houlsby's adapters of width 16."""
    return _adapted("bottleneck", Bottleneck(size=16), 3e-3)


def norms() -> Experiment:
    """The norms' scales alone."""
    return _tuned("norms", Adapted(base=_base(), trained="norm/scale$"), 3e-2)


def prompt() -> Experiment:
    """20 virtual tokens before the input."""
    return _adapted("prompt", PromptTuning(count=20), 1e-1)


def prefix() -> Experiment:
    """20 virtual keys and values in every layer."""
    return _adapted("prefix", PrefixTuning(count=20), 1e-1)


def tiny() -> Experiment:
    """QLoRA on a random model of one layer, to see that all of it runs: seconds on a CPU."""
    return _tiny("tiny", Adapted(base=Quantised(base=SMALL), adapters=(LoRA(rank=4),)))


def tiny_full() -> Experiment:
    """All parameters of that model."""
    return _tiny("tiny_full", SMALL)


def tiny_lora() -> Experiment:
    """LoRA on it."""
    return _tiny("tiny_lora", Adapted(base=SMALL, adapters=(LoRA(rank=4),)))


def tiny_prompt() -> Experiment:
    """Prompt tuning of it."""
    return _tiny("tiny_prompt", Adapted(base=SMALL, adapters=(PromptTuning(count=4),)))


def _tiny(name: str, model: Model) -> Experiment:
    """20 updates on bytes."""
    run = _tuned(name, model, 3e-3)
    data = replace(run.data, tokenizer=Bytes(), length=64)
    return replace(run, data=data, train=replace(run.train, steps=20, eval_every=20, eval_batches=2, log_every=5))
