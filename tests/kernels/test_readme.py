"""The README of pallas_kernels: its table is what the implementations say, its examples run."""

import re
import runpy

import pytest

from pallas_kernels.attention.registry import BACKENDS
from scripts import scan_table
from scripts.support_table import BEGIN, DTYPES, END, FEATURES, README, table, takes

EXAMPLES = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


def test_the_table_is_the_registry_s():
    text = README.read_text()
    assert text[text.index(BEGIN) + len(BEGIN) : text.index(END)].strip() == table()


def test_the_table_of_scans_is_what_calls_of_them_say():
    text = README.read_text()
    between = text[text.index(scan_table.BEGIN) + len(scan_table.BEGIN) : text.index(scan_table.END)]
    assert between.strip() == scan_table.table()


def test_a_scan_that_is_not_taken_is_told_from_one_that_is():
    assert scan_table.takes("gated_linear_attention", "tpu", **scan_table.DECAYS["one decay a head"])
    assert not scan_table.takes("gated_linear_attention", "tpu", **scan_table.ALL["f16"])


def test_plain_xla_takes_everything_and_comes_before_what_no_chip_has_run():
    assert all(takes("xla", **options) for options in FEATURES.values())
    assert all(takes("xla", dtype=dtype) for dtype in DTYPES.values())
    assert list(BACKENDS).index("xla") < list(BACKENDS).index("hopper")


@pytest.mark.parametrize("example", EXAMPLES, ids=["attention", "decoding", "losses", "recurrences"])
def test_examples_run(example, tmp_path):
    path = tmp_path / "example.py"
    path.write_text(example)
    names = runpy.run_path(str(path))
    results = [names[name] for name in ("out", "loss") if name in names]
    assert results
    assert all(bool((abs(result) < 100).all()) for result in results)
