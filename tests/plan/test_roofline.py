"""Arithmetic of the roofline and of the network, against numbers worked by hand."""

import dataclasses

import pytest

from llmjax.plan.chips import CHIPS, HBM_EFFICIENCY, LINK_EFFICIENCY
from llmjax.plan.collectives import Collective
from llmjax.plan.network import rate
from llmjax.plan.roofline import terms
from llmjax.plan.work import Work
from pallas_kernels import chips as kernel_chips

V5P = CHIPS["v5p"]


def gather(name, nbytes, asynchronous):
    return Collective(name, "all-gather", "body", 2.0, nbytes, (0, 1), asynchronous)


def test_terms_by_hand():
    """Instructions are bound by one or the other; synchronous collectives add up, others beyond what covers them."""
    second = V5P.flops * V5P.matmul_efficiency
    works = [
        Work("product", "body", 2, second, 1.0),
        Work("kernel", "body", 1, V5P.flops * V5P.kernel_efficiency, 0.0, kernel=True),
        Work("copy", "body", 3, 0.0, V5P.hbm_bandwidth * HBM_EFFICIENCY),
    ]
    sent = [(gather("sync", 1.0, False), 4.0), (gather("async", 1.0, True), 0.5)]
    found = terms(V5P, works, sent, lambda computation: {"copy"})
    assert (found.matmul, found.kernels, found.hbm) == pytest.approx((2, 1, 3))
    assert found.collectives == pytest.approx(0.5 + 4)
    assert found.exposed == pytest.approx(0.5 + (4 - 3))
    assert found.step == pytest.approx(2 + 1 + 3 + 1.5)
    assert terms(V5P, works, sent, lambda computation: set()).exposed == pytest.approx(4.5)


def grid(*sizes):
    places = [()]
    for size in sizes:
        places = [(*place, i) for place in places for i in range(size)]
    return places


NETWORKS = {
    # A cube of v5p is closed in all three dimensions: six links of 100 GB/s each way.
    "whole cube": ("v5p", (4, 4, 4), grid(4, 4, 4), 600e9),
    "one row of it": ("v5p", (4, 4, 4), [(x, 0, 0) for x in range(4)], 200e9),
    "half a plane": ("v5p", (4, 4, 4), [(x, y, 0) for x in range(4) for y in range(2)], 300e9),
    "less than a cube is open": ("v5p", (2, 2, 1), grid(2, 2, 1), 200e9),
    "a full pod of v6e": ("v6e", (16, 16), grid(16, 16), 400e9),
    "half of one: closed where it is 16 long": ("v6e", (8, 16), grid(8, 16), 300e9),
    "one host of H200": ("h200", (1, 1, 8), [(0, i) for i in range(8)], 450e9),
    "four whole hosts": ("h200", (4, 1, 8), [(h, i) for h in range(4) for i in range(8)], 400e9),
    "one GPU of each of four hosts": ("h200", (4, 1, 8), [(h, 0) for h in range(4)], 50e9),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_rates_by_hand(name):
    """Links that a group may use, times the data sheet's bandwidth one way, times the stated share."""
    chip, shape, places, expected = NETWORKS[name]
    assert rate(CHIPS[chip], shape, places) == pytest.approx(LINK_EFFICIENCY * expected)


def test_two_cores_of_one_chip_share_its_memory():
    chip = CHIPS["tpu7x"]
    assert rate(chip, (2, 2, 1), [(0, 0, 0), (0, 0, 0)]) == chip.hbm_bandwidth


@pytest.mark.parametrize("name", [chip.name for chip in kernel_chips.CHIPS])
def test_peaks_are_those_of_the_kernels(name):
    """One number, two tables: the kernels' own chips have the same peak."""
    (chip,) = (chip for chip in kernel_chips.CHIPS if chip.name == name)
    assert CHIPS[name].flops == chip.flops


def test_shares_are_shares():
    for chip in CHIPS.values():
        for field in dataclasses.fields(chip):
            if field.name.endswith("efficiency"):
                assert 0 < getattr(chip, field.name) < 1
