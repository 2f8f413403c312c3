"""Gated recurrences carry one thing a long way: a needle in 63 tokens of hay, and in 255.

What:   2 layers of RG-LRU (Griffin) of width 64 and nothing else, trained to repeat one value hidden in rows of 64
        tokens, tested in rows of 256. Variants: minimal GRU and LSTM, RWKV of four generations.
Cost:   30 seconds of training on two of four busy CPU cores, 0.03M parameters.
Expect: held-out accuracy 87 % in rows of 256 tokens, four times the trained length, after 800 steps (chance 6 %).
        Variants: min_gru, min_lstm, rwkv6 and rwkv7 100 %, rwkv4 95 %.
Run:    llmjax train experiments/mixers/recurrent.py --run-dir=runs/needle
        llmjax train experiments/mixers/recurrent.py:rwkv7
"""

from llmjax.config import with_
from llmjax.data import Synthetic
from llmjax.data.tasks.needle import Needle
from llmjax.decode.config import Generate
from llmjax.experiment import Experiment
from llmjax.nn.block import Block
from llmjax.nn.decoder import Decoder
from llmjax.nn.initializers import GPT2Init
from llmjax.nn.min_rnn import MinGRU, MinLSTM
from llmjax.nn.mixer import Mixer
from llmjax.nn.rg_lru import RGLRU
from llmjax.nn.rwkv4 import RWKV4
from llmjax.nn.rwkv6 import RWKV6
from llmjax.nn.rwkv7 import RWKV7
from llmjax.train.config import Train
from llmjax.train.optimizers import AdamW
from llmjax.train.schedules import Cosine


def experiment() -> Experiment:
    """A state of one number a feature, whose decay the token sets."""
    return Experiment(
        name="needle",
        model=Decoder(
            vocab=49,
            d_model=64,
            layers=2,
            pattern=(Block(mixer=RGLRU(), mlp=None),),
            initializer=GPT2Init(0.1),
        ),
        data=Synthetic(task=Needle(needles=1, keys=16, hay=16), length=64, batch_size=32, eval_length=256),
        optimizer=AdamW(schedule=Cosine(learning_rate=1e-2, warmup=0.25), weight_decay=0.0),
        train=Train(steps=800, log_every=50, eval_every=100, checkpoint_every=800),
        generate=Generate(prompt="33 34 0 3 20 35 36 37 0 3", max_tokens=1, temperature=0.0),
    )


def min_gru() -> Experiment:
    """A GRU whose gates see the token only, so that it can be scanned."""
    return _mixed("needle-min-gru", MinGRU())


def min_lstm() -> Experiment:
    """An LSTM without its state in the gates."""
    return _mixed("needle-min-lstm", MinLSTM())


def rwkv4() -> Experiment:
    """A weighted mean of the past, by feature."""
    return _mixed("needle-rwkv4", RWKV4())


def rwkv6() -> Experiment:
    """Matrices for states, decays by token."""
    return _mixed("needle-rwkv6", RWKV6())


def rwkv7() -> Experiment:
    """A generalised delta rule."""
    return _mixed("needle-rwkv7", RWKV7())


def _mixed(name: str, mixer: Mixer) -> Experiment:
    return with_(with_(experiment(), "name", name), "model.pattern.0.mixer", mixer)
