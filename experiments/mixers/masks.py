"""What a mask hides cannot be recalled: attention over a part of the past, on the task that needs all of it.

What:   2 layers of attention of width 64 under a sliding window of 16 tokens, recall of 16 pairs in 64 tokens; variants
        under the other masks.
Cost:   21 seconds of training on two of four busy CPU cores, 0.04M parameters.
Expect: held-out accuracy 12.7 % after 300 steps (chance 6 %, full attention 100 %). Variants: multiscale 59 %, strided
        29 %, block_attention 18 %, longformer and bigbird 13 %, longnet 9 %, chunked 6 %.
Run:    llmjax train experiments/mixers/masks.py --run-dir=runs/windowed
        llmjax train experiments/mixers/masks.py:multiscale
"""

from llmjax.config import with_
from llmjax.data import Synthetic
from llmjax.data.tasks.recall import Recall
from llmjax.decode.config import Generate
from llmjax.experiment import Experiment
from llmjax.nn.attention import Attention
from llmjax.nn.block import Block
from llmjax.nn.decoder import Decoder
from llmjax.nn.initializers import GPT2Init
from llmjax.nn.mask_bigbird import BigBird
from llmjax.nn.mask_longformer import Longformer
from llmjax.nn.mask_longnet import LongNet
from llmjax.nn.mask_moba import MoBA
from llmjax.nn.mask_multiscale import MultiScale
from llmjax.nn.mask_sparse import SparseTransformer
from llmjax.nn.masks import AttentionMask, Chunked, Window
from llmjax.train.config import Train
from llmjax.train.optimizers import AdamW
from llmjax.train.schedules import Cosine


def experiment() -> Experiment:
    """A window of 16 tokens: two layers see 31."""
    return Experiment(
        name="window",
        model=Decoder(
            vocab=33,
            d_model=64,
            layers=2,
            pattern=(Block(mixer=Attention(heads=4, mask=Window(16)), mlp=None),),
            initializer=GPT2Init(0.1),
        ),
        data=Synthetic(task=Recall(pairs=16, keys=16), length=64, batch_size=32),
        optimizer=AdamW(schedule=Cosine(learning_rate=5e-3, warmup=0.25), weight_decay=0.0),
        train=Train(steps=300, log_every=50, eval_every=50, checkpoint_every=300),
        generate=Generate(prompt="1 17 2 18 1", max_tokens=1, temperature=0.0),
    )


def chunked() -> Experiment:
    """Chunks of 16 tokens that do not see each other."""
    return _masked("chunked", Chunked(16))


def strided() -> Experiment:
    """Sparse Transformer: the last 8 tokens and every eighth."""
    return _masked("strided", SparseTransformer(stride=8))


def longformer() -> Experiment:
    """A window, and two tokens that all see."""
    return _masked("longformer", Longformer(window=16, globals=2))


def bigbird() -> Experiment:
    """A window of blocks, the first block, and a random one."""
    return _masked("bigbird", BigBird(block=8, globals=1, window=1, random=1))


def longnet() -> Experiment:
    """Segments of 16, 32 and 64 tokens, ever more diluted."""
    return _masked("longnet", LongNet(segments=(16, 32, 64), dilations=(1, 2, 4)))


def block_attention() -> Experiment:
    """MoBA: the own block of 8 tokens and the best other one."""
    return _masked("block-attention", MoBA(size=8, top_k=2))


def multiscale() -> Experiment:
    """Far tokens as means of ever larger groups."""
    return _masked("multiscale", MultiScale(block=8))


def _masked(name: str, mask: AttentionMask) -> Experiment:
    return with_(with_(experiment(), "name", name), "model.pattern.0.mixer.mask", mask)
