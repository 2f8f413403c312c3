"""A small decoder learns Python's own documentation: what `make demo` runs.

What:   a 6-layer LLaMA-shaped decoder with a 2048-token BPE, trained by Muon on the topics of Python's built-in help;
        whole topics are held out, and paragraphs that also stand in one of them are left out of training.
Cost:   400 steps in two and a half minutes on 2 CPU cores.
Expect: held-out bits per byte 1.77 (1.90 after 100 steps), where xz reaches 2.59 on the same bytes and 1.97 given the
        training text. The training loss falls to half of the held-out one: 410 kB are soon known by heart.
Run:    llmjax train experiments/quickstart.py --run-dir=runs/quickstart
        llmjax generate runs/quickstart --prompt='The for statement is used to'
"""

from llmjax.data import BPE, ConcatAndSplit, Data, PythonDocs
from llmjax.decode.config import Generate
from llmjax.experiment import Experiment
from llmjax.nn.attention import Attention
from llmjax.nn.block import Block
from llmjax.nn.decoder import Decoder
from llmjax.nn.mlp import GLU
from llmjax.train.config import Train
from llmjax.train.optimizers import Muon
from llmjax.train.schedules import WSD

VOCAB = 2048


def experiment() -> Experiment:
    """The demo."""
    return Experiment(
        name="quickstart",
        model=Decoder(
            vocab=VOCAB,
            d_model=256,
            layers=4,
            pattern=(Block(mixer=Attention(heads=4), mlp=GLU(), dropout=0.1),),
            tied=True,
        ),
        data=Data(source=PythonDocs(), tokenizer=BPE(VOCAB), packing=ConcatAndSplit(), length=256, batch_size=8),
        optimizer=Muon(schedule=WSD(learning_rate=3e-3, warmup=20, decay=0.4), weight_decay=0.1),
        train=Train(steps=400, log_every=10, eval_every=100, checkpoint_every=100),
        generate=Generate(prompt="The for statement is used to", max_tokens=96, temperature=0.8, top_p=0.95),
    )
