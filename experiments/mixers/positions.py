"""How tokens are told apart by place decides how long a text may be: trained on 128 bytes, tested on 1024.

What:   2 layers of attention of width 64 with ALiBi on the bytes of Python's documentation; variants with other
        positions. `llmjax eval RUN --data.length=1024` measures the trained model in longer rows.
Cost:   40 seconds of training on two of four busy CPU cores, 0.07M parameters.
Expect: held-out bits per byte 3.02 to 3.00, from 128 tokens to 1024. Variants: none 3.52 to 3.61, t5
        3.23 to 3.53, learned 3.36 to 3.90, rotary 2.71 to 4.23, sinusoidal 3.24 to 4.88.
Run:    llmjax train experiments/mixers/positions.py --run-dir=runs/alibi
        llmjax eval runs/alibi --data.length=1024 --data.batch_size=2
"""

from llmjax.config import with_
from llmjax.data import Bytes, Data, PythonDocs
from llmjax.decode.config import Generate
from llmjax.experiment import Experiment
from llmjax.nn.alibi import ALiBi
from llmjax.nn.attention import Attention
from llmjax.nn.block import Block
from llmjax.nn.decoder import Decoder
from llmjax.nn.initializers import GPT2Init
from llmjax.nn.positions import LearnedPositions, SinusoidalPositions
from llmjax.nn.rope import Rope
from llmjax.nn.t5_bias import T5Bias
from llmjax.train.config import Train
from llmjax.train.optimizers import AdamW
from llmjax.train.schedules import Cosine


def experiment() -> Experiment:
    """A linear penalty of distance, steep in some heads."""
    return Experiment(
        name="alibi",
        model=Decoder(
            vocab=257,
            d_model=64,
            layers=2,
            pattern=(Block(mixer=Attention(heads=4, rope=None), mlp=None),),
            distance=ALiBi(),
            initializer=GPT2Init(0.1),
        ),
        data=Data(source=PythonDocs(), tokenizer=Bytes(), length=128, batch_size=16),
        optimizer=AdamW(schedule=Cosine(learning_rate=5e-3, warmup=0.25), weight_decay=0.0),
        train=Train(steps=400, log_every=50, eval_every=200, checkpoint_every=400),
        generate=Generate(prompt="The for statement", max_tokens=96, temperature=0.8),
    )


def t5() -> Experiment:
    """A learned bias for each range of distances."""
    return with_(with_(experiment(), "name", "t5-bias"), "model.distance", T5Bias())


def learned() -> Experiment:
    """A table of 1024 vectors, of which 128 are trained."""
    return with_(none(), "model.positions", LearnedPositions(1024))


def sinusoidal() -> Experiment:
    """Fixed sines and cosines."""
    return with_(none(), "model.positions", SinusoidalPositions())


def rotary() -> Experiment:
    """Queries and keys turned by their place."""
    return with_(none(), "model.pattern.0.mixer.rope", Rope())


def none() -> Experiment:
    """No positions but the order that causality gives."""
    return with_(with_(experiment(), "name", "placed"), "model.distance", None)
