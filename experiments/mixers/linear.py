"""A matrix for a memory: the delta rule recalls what its state has room for, and no more.

What:   2 layers of DeltaNet of width 64 and nothing else, recall of 16 pairs in 64 tokens; variants with a state that
        is too small, with other rules of writing, and on the word problem of S3, where beta up to 2 is what matters.
Cost:   a minute of training on two of four busy CPU cores, 0.04M parameters.
Expect: held-out accuracy 99.5 % after 300 steps (chance 6 %). Variants: small_state 10 %, retention 29 %, additive,
        gla and mlstm 18 %, gated 15 %; the word problem 38 % (chance 17 %; attention has 19 %).
Run:    llmjax train experiments/mixers/linear.py --run-dir=runs/delta
        llmjax train experiments/mixers/linear.py:small_state
"""

from llmjax.config import with_
from llmjax.data import Synthetic
from llmjax.data.tasks.permutations import Permutations
from llmjax.data.tasks.recall import Recall
from llmjax.decode.config import Generate
from llmjax.experiment import Experiment
from llmjax.nn.block import Block
from llmjax.nn.decoder import Decoder
from llmjax.nn.delta_net import DeltaNet, GatedDeltaNet
from llmjax.nn.gla import GLA
from llmjax.nn.initializers import GPT2Init
from llmjax.nn.linear_attention import LinearAttention
from llmjax.nn.mixer import Mixer
from llmjax.nn.mlstm import MLSTM
from llmjax.nn.retention import Retention
from llmjax.train.config import Train
from llmjax.train.optimizers import AdamW
from llmjax.train.schedules import Cosine

PAIRS = " ".join(f"{key} {33 - key}" for key in range(1, 17))


def experiment() -> Experiment:
    """States of 4 x 16 x 16 numbers a layer; the sample is the answer to key 5, which is 28."""
    return Experiment(
        name="delta",
        model=Decoder(
            vocab=33,
            d_model=64,
            layers=2,
            pattern=(Block(mixer=DeltaNet(heads=4), mlp=None),),
            initializer=GPT2Init(0.1),
        ),
        data=Synthetic(task=Recall(pairs=16, keys=16), length=64, batch_size=32),
        optimizer=AdamW(schedule=Cosine(learning_rate=5e-3, warmup=0.25), weight_decay=0.0),
        train=Train(steps=300, log_every=50, eval_every=50, checkpoint_every=300),
        generate=Generate(prompt=f"{PAIRS} 5", max_tokens=1, temperature=0.0),
    )


def small_state() -> Experiment:
    """Keys of two numbers: 4 x 2 x 16 numbers a layer cannot hold 16 pairs."""
    return _mixed("delta-small", DeltaNet(heads=4, key_dim=2))


def gated() -> Experiment:
    """The delta rule with a state that fades."""
    return _mixed("delta-gated", GatedDeltaNet(heads=4))


def additive() -> Experiment:
    """Linear attention: what is written is never taken back."""
    return _mixed("linear-attention", LinearAttention(heads=4))


def retention() -> Experiment:
    """One fixed decay a head."""
    return _mixed("retention", Retention(heads=4))


def gla() -> Experiment:
    """Decays by feature and token."""
    return _mixed("gla", GLA(heads=4))


def mlstm() -> Experiment:
    """xLSTM's matrix memory: exponential input gates."""
    return _mixed("mlstm", MLSTM(heads=4))


def word_problem() -> Experiment:
    """Swaps of three things, beta up to 2: a write may turn a state round, which is what a swap is."""
    data = Synthetic(task=Permutations(degree=3, swaps=True), length=64, batch_size=32)
    other = with_(_mixed("delta-words", DeltaNet(heads=4, negative=True)), "data", data)
    return with_(other, "generate.prompt", "1 2")


def _mixed(name: str, mixer: Mixer) -> Experiment:
    return with_(with_(experiment(), "name", name), "model.pattern.0.mixer", mixer)
