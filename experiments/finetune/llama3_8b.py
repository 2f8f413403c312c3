"""Llama-3.1-8B on one GPU: LoRA on a bfloat16 base for 80 GB, QLoRA on an NF4 base for 24 GB.

What:   rank 16 on all linear layers (41.9M parameters of 8.03B), rows of 2,048 tokens of your own texts, an update for
        16 rows. The base is read from the folder as it is published; `llmjax export RUN_DIR PATH` writes peft's files,
        with --merge the whole model.
Cost:   estimated by `llmjax plan --target=h200:1x1x1`, no GPU has run it (4 rows at a time; 32,768 tokens a step). LoRA
        20.3 GiB, of which the base is 15.0; 3.06 s a step, MFU 34.5 %. QLoRA 10.7 GiB, base 5.3 (tables and head in
        bfloat16 are 2.0 of it); 3.04 s, MFU 34.7 %. Attention's loops are counted once, as if it were free.
Expect: not known: no GPU has trained it yet.
Run:    llmjax train experiments/finetune/llama3_8b.py --data.source.path=texts.jsonl --run-dir=runs/lora
        llmjax plan experiments/finetune/llama3_8b.py:qlora --target=h200:1x1x1
"""

from dataclasses import replace

from llmjax.adapters import Adapted, LoRA
from llmjax.data import JSONL, Bytes, Data, InMemory, TokenizerJson
from llmjax.experiment import Experiment
from llmjax.models.llama import llama31
from llmjax.models.pretrained import FromPretrained
from llmjax.nn.attention import Attention
from llmjax.nn.block import Block
from llmjax.nn.decoder import Decoder
from llmjax.nn.mlp import GLU
from llmjax.nn.model import Model
from llmjax.objectives.next_token import NextToken
from llmjax.quant.quantised import Quantised
from llmjax.quant.quantize import Quantize
from llmjax.train.config import Train
from llmjax.train.optimizers import AdamW
from llmjax.train.precision import Precision
from llmjax.train.schedules import Cosine

BASE = "models/Llama-3.1-8B"
LINEAR = LoRA(rank=16, alpha=16.0, dropout=0.05)


def experiment() -> Experiment:
    """LoRA on a base in bfloat16: fits 80 GB."""
    return _tuned("llama3_8b_lora", Adapted(base=_base(), adapters=(LINEAR,), frozen_dtype="bfloat16"), accumulate=4)


def qlora() -> Experiment:
    """LoRA on a base in NF4, its scales in 8 bits, the rest in bfloat16: fits 24 GB."""
    packed = Quantised(base=_base(), quantize=Quantize(rest="bfloat16"))
    return _tuned("llama3_8b_qlora", Adapted(base=packed, adapters=(LINEAR,), frozen_dtype="bfloat16"), accumulate=4)


def _base() -> Model:
    """The published model; blocks are computed again in the backward pass."""
    return FromPretrained(BASE, base=replace(llama31("8B"), remat="full", unroll=1))


def _tuned(name: str, model: Model, accumulate: int) -> Experiment:
    """1,000 updates of 16 rows."""
    return Experiment(
        name=name,
        model=model,
        data=Data(
            source=JSONL(path="texts.jsonl"),
            tokenizer=TokenizerJson(path=f"{BASE}/tokenizer.json"),
            length=2048,
            batch_size=16,
        ),
        objective=NextToken(chunk=1024),
        optimizer=AdamW(schedule=Cosine(learning_rate=2e-4, warmup=0.03), weight_decay=0.0, b2=0.999, clip=0.3),
        train=Train(
            steps=1000,
            accumulate=accumulate,
            precision=Precision(compute="bfloat16"),
            eval_every=100,
            eval_batches=16,
            checkpoint_every=100,
        ),
    )


def tiny() -> Experiment:
    """QLoRA of the same kind on a random model of one layer and a few bytes: seconds on a CPU."""
    small = Decoder(
        vocab=257, d_model=64, layers=1, pattern=(Block(mixer=Attention(heads=2), mlp=GLU()),), remat="full"
    )
    packed = Quantised(base=small, quantize=Quantize(rest="bfloat16"))
    run = _tuned(
        "tiny", Adapted(base=packed, adapters=(replace(LINEAR, rank=4),), frozen_dtype="bfloat16"), accumulate=4
    )
    texts = tuple(f"{i} and {i} are {2 * i}, {i} times {i} is {i * i}. " * 4 for i in range(200))
    data = replace(run.data, source=InMemory(texts=texts), tokenizer=Bytes(), length=64)
    train = replace(run.train, steps=20, eval_every=20, eval_batches=2, log_every=5)
    return replace(run, data=data, objective=NextToken(chunk=None), train=train)
