"""Plans of decoding: memory and FLOPs against sums by hand, the step against generation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmjax.cli import main
from llmjax.config import with_
from llmjax.decode.config import Generate
from llmjax.decode.generate import generate
from llmjax.experiment import Experiment, load_experiment
from llmjax.nn.attention import Attention
from llmjax.nn.block import Block
from llmjax.nn.decoder import Decoder
from llmjax.nn.mamba2 import Mamba2
from llmjax.nn.masks import Window
from llmjax.nn.mlp import GLU
from llmjax.parallel.mesh import MeshConfig
from llmjax.plan.decode import forward_flops, make, next_of
from llmjax.plan.target import parse
from tests.plan.test_command import ROOT, TINY

pytestmark = pytest.mark.devices(4)

LAYERS, WIDTH, HEADS, KV_HEADS, HIDDEN, VOCAB = 2, 32, 4, 2, 64, 257
HEAD_DIM = WIDTH // HEADS
ROWS, LENGTH = 8, 64
BF16 = 2
WEIGHTS = LAYERS * (2 * WIDTH * (HEADS + KV_HEADS) * HEAD_DIM + 3 * WIDTH * HIDDEN)
HEAD = WIDTH * VOCAB
CACHE = LAYERS * ROWS * LENGTH * 2 * KV_HEADS * HEAD_DIM * BF16


def small(mesh: MeshConfig, **changes: object) -> Experiment:
    """A decoder whose every size is told above, in bfloat16, on a mesh."""
    block = Block(mixer=Attention(heads=HEADS, kv_heads=KV_HEADS), mlp=GLU(d_ff=HIDDEN))
    model = Decoder(vocab=VOCAB, d_model=WIDTH, layers=LAYERS, pattern=(block,), unroll=1)
    found = with_(with_(load_experiment(TINY), "model", model), "mesh", mesh)
    fields = {"data.batch_size": ROWS, "data.length": LENGTH, "train.precision.compute": "bfloat16"}
    for path, value in (fields | {"generate.cache_dtype": "bfloat16"} | changes).items():
        found = with_(found, path, value)
    return found


def test_memory_and_flops_of_decoding_by_hand():
    """Exact: rows of the cache over data, its heads over tensor; positions and the slot are four bytes each.

    Executed FLOPs within 1 %, for rotations: products with weights, and with all 64 keys and values. The head's product
    may be done on both parts of tensor.
    """
    found = make(small(MeshConfig(data=2, tensor=2)), parse("cpu:4"), "decode")
    split_weights = WEIGHTS // 2 + 2 * HEAD  # 257 ids do not divide: embedding and head are whole
    norms = (2 * LAYERS + 1) * WIDTH
    assert found["memory"]["parameters"] == BF16 * (split_weights + norms)
    assert found["memory"]["cache"] == CACHE // 4 + 4 * ROWS // 2 * LENGTH + 4
    assert found["memory"]["gradients"] == 0
    assert found["hbm_bytes_per_chip"] == found["memory"]["total"] < found["hbm_limit_bytes"]
    assert found["fits"]
    assert found["tokens_per_step"] == ROWS
    expected = ROWS * (2 * (WEIGHTS + HEAD) + LAYERS * 4 * HEADS * HEAD_DIM * LENGTH)
    assert found["model_flops_per_step"] == expected
    assert 0.99 * expected / 4 <= found["executed_flops"] <= 1.01 * (expected / 4 + ROWS // 2 * HEAD)


def test_flops_of_a_prompt_are_those_of_its_tokens():
    """Each mixer: the FLOPs of the last token of rows of 1 to 24 add up to those of a row, but for the head's."""
    for mixer in (Attention(heads=4), Attention(heads=4, mask=Window(8)), Mamba2(head_dim=16)):
        model = Decoder(vocab=VOCAB, d_model=WIDTH, layers=LAYERS, pattern=(Block(mixer=mixer),))
        singles = sum(forward_flops(model, length, 1) for length in range(1, 25))
        assert singles - 23 * 2 * HEAD == pytest.approx(forward_flops(model, 24, 24), rel=1e-12)


def test_a_prefill_counts_its_prompts():
    """Tokens of all rows; the cache is the same as decoding's."""
    found = make(small(MeshConfig(fsdp=2)), parse("cpu:2"), "prefill")
    assert found["tokens_per_step"] == ROWS * LENGTH
    assert found["memory"]["cache"] == CACHE // 2 + 4 * ROWS // 2 * LENGTH + 4
    assert "bound" not in found


@pytest.mark.slow
def test_the_planned_step_is_that_of_generation():
    """Prefill and three steps draw the tokens that `generate` draws greedily; exact, both are float32."""
    model = small(MeshConfig()).model
    params = model.init(jax.random.key(0))
    prompts = np.random.default_rng(0).integers(0, VOCAB, (2, 16)).tolist()
    expected = generate(Generate(max_tokens=4, temperature=0.0, stop_at_eos=False), model, params, prompts).tokens
    step = jax.jit(next_of(model))
    state, tokens = model.init_state(2, 24, "float32"), jnp.array(prompts)
    positions, drawn = jnp.broadcast_to(jnp.arange(16), (2, 16)), []
    for count in range(4):
        last, state = step(params, state, tokens, positions)
        tokens, positions = last[:, None], jnp.full((2, 1), 16 + count)
        drawn.append(last)
    np.testing.assert_array_equal(np.stack(drawn, 1), expected)


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--step=decode", "--search"], "--search tries variants of training"),
        (["--step=serve"], "invalid choice: 'serve'"),
    ],
)
def test_wrong_requests_are_told_in_a_line(words, why, capsys):
    assert main(["plan", TINY, "--target=cpu:1", *words]) == 2
    error = capsys.readouterr().err
    assert why in error


def test_only_decoders_are_planned():
    encoder = load_experiment(str(ROOT / "experiments" / "encoder.py"))
    with pytest.raises(ValueError, match="only a Decoder's is planned"):
        make(encoder, parse("cpu:1"), "decode")
