"""Attention-only models: layers of attention without MLP or norm, whose circuits can be written out.

Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits" (transformer-circuits.pub/2021/framework).
"""

from llmjax.nn.attention import Attention
from llmjax.nn.block import Block
from llmjax.nn.decoder import Decoder
from llmjax.nn.initializers import GPT2Init


def attention_only(layers: int, d_model: int, heads: int, vocab: int) -> Decoder:
    """The config of x_{l+1} = x_l + sum_h A_lh x_l OV_lh, x_0 = W_E[tokens], logits = x_L W_U.

    OV_lh is the `[d_model, d_model]` product of the value and output matrices of head h in layer l, A_lh
    `[length, length]` its attention. For given A the logits are linear in x_0, a sum over paths of which each goes
    through at most one head a layer: W_E[tokens] W_U, what no head moves, and for each choice of heads the product of
    their A (the last on the left) times W_E[tokens] times the product of their OV (the first on the left) times W_U.
    Without layers that leaves W_E W_U, a table of bigrams. Positions are rotary: like those of the paper, which are
    added to queries and keys, they are in A and not in the stream.

    The initial weights are N(0, 0.64 / d_model), those that write into the stream divided by 2 layers: no norm would
    make good for smaller ones. Values that do not fit (`heads` does not divide `d_model`) are errors of the experiment.
    """
    block = Block(mixer=Attention(heads=heads), mlp=None, norm=None)
    return Decoder(
        vocab=vocab,
        d_model=d_model,
        layers=layers,
        pattern=(block,),
        norm=None,
        initializer=GPT2Init(std=0.8 / d_model**0.5),
    )
