"""Parameters of transformers' models with experts at the published sizes: on the meta device, no memory is used."""

import pytest
import torch
import transformers

from llmjax.models.families import family_of
from tests.evidence import evidence
from tests.models.test_experts import PUBLISHED

pytestmark = pytest.mark.parity


@pytest.mark.parametrize(
    ("config", "count"),
    [
        pytest.param(
            config,
            count,
            id=name,
            marks=evidence(row, oracle="transformers model on the meta device, its parameters", code=code),
        )
        for name, (config, count, known) in PUBLISHED.items()
        for row, code in [known.replace(" ", " llmjax.models.").split()]
    ],
)
def test_transformers_has_as_many_parameters(config, count, evidence):
    """The biases of DeepSeek-V3's choice, which it keeps as buffers, included."""
    theirs = transformers.AutoConfig.for_model(**family_of(config).to_hf_config(config))
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(theirs)
    biases = sum(b.numel() for name, b in model.named_buffers() if name.endswith("e_score_correction_bias"))
    evidence.record(abs(model.num_parameters() + biases - count), 0)
