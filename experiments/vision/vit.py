"""A vision transformer learns six shapes: the smallest run on images.

What:   a ViT of 4 layers, width 64, on 32 x 32 pictures of one coloured shape each, cut into 16 patches; the class is
        the form, whatever its colour, place and size. Pictures are drawn as they are needed, none is seen twice.
Cost:   0.2M parameters; 80 seconds of training on 4 CPU cores that were busy with three times as much other work.
Expect: 98.4 % of 512 held-out pictures (chance: 17 %).
Run:    llmjax train experiments/vision/vit.py --run-dir=runs/vit
"""

from llmjax.data.shapes import FORMS, Shapes
from llmjax.experiment import Experiment
from llmjax.nn.positions import LearnedPositions
from llmjax.nn.vit import ViT
from llmjax.objectives.classification import Classification
from llmjax.train.config import Train
from llmjax.train.optimizers import AdamW
from llmjax.train.schedules import Cosine


def experiment() -> Experiment:
    """Six classes."""
    return Experiment(
        name="vit",
        model=ViT(patch=8, classes=len(FORMS), d_model=64, layers=4, positions=LearnedPositions(17)),
        data=Shapes(batch_size=64),
        objective=Classification(),
        optimizer=AdamW(schedule=Cosine(learning_rate=2e-3, warmup=30)),
        train=Train(steps=600, log_every=20, eval_every=100, checkpoint_every=100),
    )
