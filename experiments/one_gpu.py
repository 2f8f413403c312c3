"""GPT-2 small, LLaMA-shaped, on one GPU: the recipe to start from for pretraining on a single accelerator.

What:   12 layers of width 768 (124M parameters with a tied head) on your own token shards, bfloat16 compute on float32
        parameters, 2 x 32 rows of 1024 tokens an update, AdamW, cosine schedule.
Cost:   about 9e17 FLOPs a billion tokens. Not timed yet: no GPU was at hand; the step is compiled for an H200 in the
        hardware suite, which asserts that it fits.
Run:    llmjax train experiments/one_gpu.py --data.source.path=tokens/ --run-dir=runs/one_gpu
        (make the shards with llmjax.data.write_token_shards)
"""

from llmjax.data import Data, TokenShards
from llmjax.experiment import Experiment
from llmjax.nn.attention import Attention
from llmjax.nn.block import Block
from llmjax.nn.decoder import Decoder
from llmjax.nn.mlp import GLU
from llmjax.objectives.next_token import NextToken
from llmjax.train.config import Train
from llmjax.train.optimizers import AdamW
from llmjax.train.precision import Precision
from llmjax.train.schedules import Cosine


def experiment() -> Experiment:
    """124M parameters, 65,536 tokens an update."""
    return Experiment(
        name="one_gpu",
        model=Decoder(
            vocab=50304,
            d_model=768,
            layers=12,
            pattern=(Block(mixer=Attention(heads=12), mlp=GLU()),),
            tied=True,
            remat="none",
            unroll=1,
        ),
        data=Data(source=TokenShards(path="tokens"), length=1024, batch_size=64),
        objective=NextToken(chunk=4096, z_loss=1e-4),
        optimizer=AdamW(schedule=Cosine(learning_rate=6e-4, warmup=700), weight_decay=0.1, b2=0.95),
        train=Train(
            steps=15000,
            accumulate=2,
            precision=Precision(compute="bfloat16"),
            log_every=20,
            eval_every=500,
            eval_batches=40,
            checkpoint_every=1000,
        ),
    )
