"""The worked example of docs/adding_a_mixer.md works: its test passes, and so does the contract suite for its mixer.

In a process of its own, so that the example's class is known to no other test.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CONTRACT = """
from ema import EMA
from tests.nn import test_mixers as contract

def test_the_contract():
    contract.CASES["EMA"] = EMA()
    contract.test_neither_packing_nor_padding_changes_a_document("EMA")
    contract.test_the_past_does_not_see_the_future_nor_another_document("EMA")
    contract.test_decoding_in_parts_equals_the_whole("EMA")
    contract.test_parameters_have_logical_axes_and_activations_are_sites("EMA")
"""


@pytest.mark.mixers
def test_the_worked_example_works(tmp_path):
    module, test = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "adding_a_mixer.md").read_text(), re.DOTALL)
    (tmp_path / "ema.py").write_text(module)
    (tmp_path / "test_ema.py").write_text(test)
    (tmp_path / "test_contract.py").write_text(CONTRACT)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "addopts=", str(tmp_path)]
    paths = {"PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    result = subprocess.run(command, cwd=tmp_path, env=os.environ | paths, capture_output=True, text=True, check=False)
    assert "2 passed" in result.stdout, result.stdout + result.stderr
