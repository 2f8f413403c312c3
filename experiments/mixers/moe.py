"""Experts: each token passes through 2 of 8 feed-forward layers, on the bytes of experiments/tiny.py.

What:   experiments/tiny.py with 8 experts of a quarter of its feed-forward layer's width, 2 for each token: half the
        FLOPs in feed-forward layers, twice the weights. A capacity of 1.5 keeps all products of one size, which is
        quicker on a CPU. Variants: one expert of the whole width a token (Switch), and no losses but biases
        (DeepSeek-V3).
Cost:   two minutes of training on two of four busy CPU cores, 0.21M parameters.
Expect: held-out bits per byte 2.53 after 400 steps. Variants: switch 2.43, biased 2.57.
Run:    llmjax train experiments/mixers/moe.py --run-dir=runs/moe
        llmjax train experiments/mixers/moe.py:switch
"""

from llmjax.config import with_
from llmjax.data import Bytes, ConcatAndSplit, Data, PythonDocs
from llmjax.decode.config import Generate
from llmjax.experiment import Experiment
from llmjax.nn.attention import Attention
from llmjax.nn.block import Block
from llmjax.nn.decoder import Decoder
from llmjax.nn.mlp import GLU
from llmjax.nn.moe import MoE
from llmjax.nn.router import TopK
from llmjax.train.config import Train
from llmjax.train.optimizers import AdamW
from llmjax.train.schedules import Cosine


def experiment() -> Experiment:
    """Two layers of width 64, 8 experts each."""
    moe = MoE(experts=8, expert=GLU(d_ff=48), capacity=1.5)
    return Experiment(
        name="moe",
        model=Decoder(vocab=257, d_model=64, layers=2, pattern=(Block(mixer=Attention(heads=4), mlp=moe),)),
        data=Data(source=PythonDocs(), tokenizer=Bytes(), packing=ConcatAndSplit(), length=128, batch_size=16),
        optimizer=AdamW(schedule=Cosine(learning_rate=3e-3, warmup=20)),
        train=Train(steps=400, log_every=20, eval_every=100, checkpoint_every=100),
        generate=Generate(prompt="The for statement", max_tokens=96, temperature=0.8),
    )


def switch() -> Experiment:
    """One expert a token, as wide as tiny.py's feed-forward layer."""
    moe = MoE(experts=8, expert=GLU(), router=TopK(k=1, normalise=False), capacity=1.5)
    return with_(with_(experiment(), "name", "moe-switch"), "model.pattern.0.mlp", moe)


def biased() -> Experiment:
    """The load evened by biases of the router instead of a loss."""
    moe = MoE(experts=8, expert=GLU(d_ff=48), capacity=1.5, balance_loss=0.0, bias_rate=0.001)
    return with_(with_(experiment(), "name", "moe-biased"), "model.pattern.0.mlp", moe)
