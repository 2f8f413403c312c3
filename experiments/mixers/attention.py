"""Attention looks things up: 16 pairs of key and value are recalled from 64 tokens, whatever the pairs are.

What:   2 layers of attention of width 64 and nothing else, multi-query associative recall. Variants: other attentions
        on the same task, and the word problem of S3, which attention cannot do unless it writes each step down.
Cost:   18 seconds of training on two of four busy CPU cores, 0.04M parameters.
Expect: held-out accuracy 100 % after 300 steps (chance 6 %). Variants: differential 100 %, latent 20 %, additive 19 %,
        hashed 14 %, memorizing 12 %; from other first weights differential has 33 % (docs/mixers.md). The word problem:
        19 % (chance 17 %), and 100 % where each step is written down.
Run:    llmjax train experiments/mixers/attention.py --run-dir=runs/recall
        llmjax train experiments/mixers/attention.py:latent
"""

from llmjax.config import with_
from llmjax.data import Synthetic
from llmjax.data.tasks.permutations import Permutations
from llmjax.data.tasks.recall import Recall
from llmjax.decode.config import Generate
from llmjax.experiment import Experiment
from llmjax.nn.additive_attention import AdditiveAttention
from llmjax.nn.attention import Attention
from llmjax.nn.block import Block
from llmjax.nn.decoder import Decoder
from llmjax.nn.differential import DifferentialAttention
from llmjax.nn.initializers import GPT2Init
from llmjax.nn.lsh_attention import LSHAttention
from llmjax.nn.memorizing import MemorizingAttention
from llmjax.nn.mixer import Mixer
from llmjax.nn.mla import MLA
from llmjax.train.config import Train
from llmjax.train.optimizers import AdamW
from llmjax.train.schedules import Cosine

PAIRS = " ".join(f"{key} {33 - key}" for key in range(1, 17))


def experiment() -> Experiment:
    """Two layers of attention, 16 pairs; the sample is the answer to key 5, which is 28."""
    return Experiment(
        name="recall",
        model=Decoder(
            vocab=33,
            d_model=64,
            layers=2,
            pattern=(Block(mixer=Attention(heads=4), mlp=None),),
            initializer=GPT2Init(0.1),
        ),
        data=Synthetic(task=Recall(pairs=16, keys=16), length=64, batch_size=32),
        optimizer=AdamW(schedule=Cosine(learning_rate=5e-3, warmup=0.25), weight_decay=0.0),
        train=Train(steps=300, log_every=50, eval_every=50, checkpoint_every=300),
        generate=Generate(prompt=f"{PAIRS} 5", max_tokens=1, temperature=0.0),
    )


def additive() -> Experiment:
    """Scores from a sum and a tanh (Bahdanau)."""
    return _mixed("recall-additive", AdditiveAttention())


def differential() -> Experiment:
    """The difference of two softmax maps."""
    return _mixed("recall-differential", DifferentialAttention())


def latent() -> Experiment:
    """Multi-head latent attention: 24 numbers a token are kept instead of 128."""
    return _mixed("recall-latent", MLA(kv_rank=16, q_rank=None, nope_dim=8, rope_dim=8, value_dim=16))


def hashed() -> Experiment:
    """Reformer: tokens see those of their own bucket."""
    return _mixed("recall-hashed", LSHAttention(buckets=8, reach=8))


def memorizing() -> Experiment:
    """Segments of 16 tokens, and the best 8 of the tokens before, through which no gradient flows."""
    return _mixed("recall-memorizing", MemorizingAttention(segment=16, memory=64, retrieved=8))


def word_problem() -> Experiment:
    """Products of permutations of three things: out of reach."""
    data = Synthetic(task=Permutations(degree=3), length=64, batch_size=32)
    other = with_(with_(experiment(), "name", "word-problem"), "data", data)
    return with_(other, "generate.prompt", "1 2")


def chain_of_thought() -> Experiment:
    """The same where each product is written down: one step at a time is within reach."""
    return with_(with_(word_problem(), "name", "chain-of-thought"), "data.task.chain", True)


def _mixed(name: str, mixer: Mixer) -> Experiment:
    return with_(with_(experiment(), "name", name), "model.pattern.0.mixer", mixer)
