"""Instruction tuning of Llama-2-7B: LoRA on queries and values, a loss on the responses alone.

What:   the 52,002 records of Alpaca (Taori et al. 2023), or others with their fields, one a row of 512 tokens; 5 % of
        the prompts held out by their hash, 3 passes over the rest. Rank 16, alpha 32, dropout 0.05 (Hu et al. 2021,
        2106.09685) on a frozen base in bfloat16; 16 rows an update, 4 at a time. `experiment` trains 8,388,608
        parameters (0.12 % of 6,738,415,616), `attention` 16,777,216, `all_linear` 39,976,960 (0.59 %). Records that
        cannot be read, and those longer than a row, are left out and counted.
        The toy needs no download: `tiny` trains a model of 0.14M parameters on four rules about words (uppercase,
        reverse, count, first letter), `tiny_lora` teaches it a fifth, to repeat the word, in 200 updates.
Cost:   estimated by `llmjax plan --target=h200:1x1x1`, no GPU has run it: `experiment` 13.9 GiB, of which the base is
        12.6, 0.69 s a step, MFU 32.3 %; `all_linear` 14.7 GiB, 0.76 s, MFU 29.6 %. Attention's loops are counted once,
        as if it were free. The toy: 21 to 50 s and 10 to 17 s of training on 2 busy CPU cores, compilation apart.
Expect: 7B: not known. The toy, on held-out words, greedy, one seed: the base answers its four rules all exactly (0.002
        bits a byte); the fifth rule 0 % before (12.10) and 99.0 % after (0.053). LoRA forgets on the way: 42.8 % of the
        four rules are left (4.91). Another seed ended at 0.107 and 0.127 bits a byte; a learning rate of 5e-3 at
        0.340 and 0.371.
Run:    jq -c '.[]' alpaca_data.json > alpaca.jsonl
        llmjax train experiments/finetune/instruct.py --data.source.path=alpaca.jsonl --run-dir=runs/instruct
        llmjax plan experiments/finetune/instruct.py:all_linear --target=h200:1x1x1
        python -m scripts.rule_instructions instructions.jsonl
        python -m scripts.rule_instructions repeating.jsonl "Repeat the word"
        llmjax train experiments/finetune/instruct.py:tiny --run-dir=runs/toy
        llmjax export runs/toy models/toy
        llmjax train experiments/finetune/instruct.py:tiny_lora --run-dir=runs/toy_lora
"""

from dataclasses import replace

from llmjax.adapters import Adapted, LoRA
from llmjax.data import Bytes, Data, Padded, TokenizerJson
from llmjax.data.instructions import Instructions, Template
from llmjax.decode.config import Generate
from llmjax.experiment import Experiment
from llmjax.models.llama import llama2
from llmjax.models.pretrained import FromPretrained
from llmjax.nn.attention import Attention
from llmjax.nn.block import Block
from llmjax.nn.decoder import Decoder
from llmjax.nn.initializers import FanInInit
from llmjax.nn.mlp import GLU
from llmjax.nn.model import Model
from llmjax.objectives.next_token import NextToken
from llmjax.train.config import Train
from llmjax.train.optimizers import AdamW
from llmjax.train.precision import Precision
from llmjax.train.schedules import Cosine

BASE = "models/Llama-2-7b-hf"
ADAPTER = LoRA(targets="qv", rank=16, alpha=32.0, dropout=0.05)

BRIEF = Template(with_input="{instruction}: {input}\n", without_input="{instruction}\n")
"""Of the toy: its bytes are tokens."""
TOY = "models/toy"


def experiment() -> Experiment:
    """Queries and values, as the LoRA paper has it."""
    return _tuned("llama2_7b_instruct", "qv")


def attention() -> Experiment:
    """All four projections of attention."""
    return _tuned("llama2_7b_instruct_attention", "attention")


def all_linear() -> Experiment:
    """All seven matrices of a block, as QLoRA has it."""
    return _tuned("llama2_7b_instruct_all_linear", "all-linear")


def _tuned(name: str, targets: str) -> Experiment:
    """3 passes over 49,401 rows of Alpaca; LoRA's learning rate is about ten times that of full fine-tuning."""
    base = FromPretrained(BASE, base=replace(llama2("7B"), remat="full", unroll=1))
    return Experiment(
        name=name,
        model=Adapted(base=base, adapters=(replace(ADAPTER, targets=targets),), frozen_dtype="bfloat16"),
        data=Data(
            source=Instructions(path="alpaca.jsonl", longest=512),
            tokenizer=TokenizerJson(path=f"{BASE}/tokenizer.json"),
            packing=Padded(),
            on_error="skip",
            length=512,
            batch_size=16,
        ),
        objective=NextToken(chunk=1024),
        optimizer=AdamW(
            schedule=Cosine(learning_rate=2e-4, warmup=100, floor=0.0), weight_decay=0.01, b1=0.9, b2=0.999
        ),
        train=Train(
            steps=9261,
            accumulate=4,
            precision=Precision(compute="bfloat16"),
            eval_every=500,
            eval_batches=40,
            checkpoint_every=500,
            keep_last=3,
        ),
        generate=Generate(
            prompt=Template().prompt("Name the three primary colours."), max_tokens=256, temperature=0.7, top_p=0.9
        ),
    )


def tiny() -> Experiment:
    """The toy's base: all parameters of a random model of two layers, on four rules."""
    return _toy("tiny", _small(), "Uppercase the word", "instructions.jsonl", steps=400)


def tiny_lora() -> Experiment:
    """The toy itself: LoRA on that base, exported, learns a fifth rule."""
    model = Adapted(base=FromPretrained(TOY, base=_small()), adapters=(ADAPTER,))
    return _toy("tiny_lora", model, "Repeat the word", "repeating.jsonl", steps=200)


def _small() -> Decoder:
    """Its matrices have unit gain from the start, so that attention finds the letters within few updates."""
    block = Block(mixer=Attention(heads=4), mlp=GLU())
    return Decoder(vocab=257, d_model=64, layers=2, pattern=(block,), initializer=FanInInit())


def _toy(name: str, model: Model, rule: str, path: str, steps: int) -> Experiment:
    """Updates of 64 records with words of 3 and 4 letters; `rule` is what the sample asks for."""
    return Experiment(
        name=name,
        model=model,
        data=Data(
            source=Instructions(path=path, template=BRIEF, longest=36),
            tokenizer=Bytes(),
            packing=Padded(),
            length=36,
            batch_size=64,
        ),
        objective=NextToken(chunk=None),
        optimizer=AdamW(schedule=Cosine(learning_rate=3e-3, warmup=20), weight_decay=0.01, b2=0.99),
        train=Train(steps=steps, log_every=50, eval_every=50, checkpoint_every=0, keep_best=0),
        generate=Generate(prompt=BRIEF.prompt(rule, "bead"), max_tokens=8, temperature=0.0),
    )
