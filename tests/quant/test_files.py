"""Other libraries' layouts, written here bit by bit from their published descriptions."""

import json

import numpy as np
import pytest

from llmjax.config import InputError
from llmjax.quant.files import from_awq, from_bitsandbytes, from_gptq
from llmjax.quant.tensor import Layout

LAYOUT = Layout((32,), (2, 8))


def parts(bits, groups, seed=0):
    """Codes `[inputs, outputs]`, zero points and scales `[groups, outputs]`, and the group of every input."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 2**bits, (32, 16))
    zeros, scales = rng.integers(1, 2**bits, (groups, 16)), rng.random((groups, 16)).astype(np.float16)
    return codes, zeros, scales, np.arange(32) * groups // 32


def words(codes, bits):
    """Columns of codes as int32 words, the first code in the lowest bits, running across words."""
    found = np.zeros((codes.shape[0] * bits // 32, codes.shape[1]), np.int64)
    for row, column in np.ndindex(codes.shape):
        for bit in range(bits):
            place = row * bits + bit
            found[place // 32, column] |= (int(codes[row, column]) >> bit & 1) << (place % 32)
    return found.astype(np.uint32).view(np.int32)


@pytest.mark.parametrize(
    ("bits", "order", "first"), [(4, False, True), (2, True, True), (8, True, False), (4, True, False)]
)
def test_gptq(bits, order, first):
    codes, zeros, scales, group = parts(bits, 4)
    group = np.random.default_rng(1).permutation(group) if order else group
    tensors = {
        "qweight": words(codes, bits),
        "qzeros": words((zeros - 1 if first else zeros).T, bits).T,
        "scales": scales,
        "g_idx": group.astype(np.int32),
    }
    want = (codes - zeros[group]) * scales[group].astype(np.float32)
    tensor = from_gptq(tensors, LAYOUT, bits=bits, first_format=first)
    np.testing.assert_array_equal(tensor.dense(), want.reshape(32, 2, 8))
    assert (tensor.order is None) != order
    assert tensor.codes.size == 32 * 16 * bits // 8


def test_gptq_of_three_bits():
    """Ten codes and two bits of the eleventh lie in the first word; codes run on."""
    codes, zeros, scales, group = parts(3, 1)
    zeros = np.concatenate([zeros, zeros], axis=1)
    wide = Layout((32,), (32,))
    codes, scales = np.concatenate([codes, codes[::-1]], axis=1), np.concatenate([scales, scales], axis=1)
    tensors = {"qweight": words(codes, 3), "qzeros": words((zeros - 1).T, 3).T, "scales": scales}
    first = np.uint32(tensors["qweight"][0, 0].view(np.uint32))
    assert first >> 30 == codes[10, 0] & 3
    want = (codes - zeros[group]) * scales[group].astype(np.float32)
    np.testing.assert_array_equal(from_gptq(tensors, wide, bits=3).dense(), want)


def awq_words(rows):
    """Rows of codes of 4 bits as int32 words."""
    found = np.zeros((rows.shape[0], rows.shape[1] // 8), np.int64)
    for row, word, nibble in np.ndindex(*found.shape, 8):
        found[row, word] |= int(rows[row, 8 * word + (0, 2, 4, 6, 1, 3, 5, 7)[nibble]]) << (4 * nibble)
    return found.astype(np.uint32).view(np.int32)


def test_awq():
    codes, zeros, scales, group = parts(4, 2)
    tensor = from_awq({"qweight": awq_words(codes), "qzeros": awq_words(zeros), "scales": scales}, LAYOUT)
    want = (codes - zeros[group]) * scales[group].astype(np.float32)
    np.testing.assert_array_equal(tensor.dense(), want.reshape(32, 2, 8))


def test_what_does_not_fit_is_refused():
    """With one line that names it."""
    codes, zeros, scales, _ = parts(4, 4)
    good = {"qweight": words(codes, 4), "qzeros": words((zeros - 1).T, 4).T, "scales": scales}
    bad = {
        "tensor qzeros is missing": {"qweight": good["qweight"], "scales": scales},
        "qweight .* does not fit": good | {"qweight": good["qweight"][:2]},
        "no group for each of 32": good | {"g_idx": np.full(32, -1)},
        "uneven groups": good | {"g_idx": np.zeros(32, np.int32)},
        "4 groups do not divide|scales .* do not fit": good | {"scales": scales[:, :8]},
    }
    for message, tensors in bad.items():
        with pytest.raises(InputError, match=message):
            from_gptq(tensors, LAYOUT)
    state = np.frombuffer(json.dumps({"blocksize": 64, "shape": [16, 32]}).encode(), np.uint8)
    for message, tensors in {
        "not a 4-bit weight": {},
        "blocksize='a', wanted a int": {
            "quant_state.bitsandbytes__nf4": np.frombuffer(b'{"blocksize": "a"}', np.uint8)
        },
        "not a JSON": {"quant_state.bitsandbytes__nf4": np.zeros(3, np.uint8)},
        "quant_map is missing": {"quant_state.bitsandbytes__nf4": state},
        "quant_map is not that of nf4": {"quant_state.bitsandbytes__nf4": state, "quant_map": np.zeros(16)},
    }.items():
        with pytest.raises(InputError, match=message):
            from_bitsandbytes(tensors, LAYOUT)
