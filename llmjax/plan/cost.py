"""What a run costs: FLOPs, chip hours, days and money."""

from typing import NamedTuple


class Cost(NamedTuple):
    """The bill of a run."""

    flops: float
    """Of training, by 6 N D."""
    days: float
    """Of the clock."""
    chip_hours: float
    price: float
    """In the currency that an hour of a chip is given in."""


def training_flops(params: float, tokens: float) -> float:
    """6 N D: two FLOPs a parameter and token forward, four backward; no attention (Kaplan et al. 2020, 2001.08361)."""
    return 6.0 * params * tokens


def cost(params: float, tokens: float, tokens_per_second: float, chips: int, hour: float) -> Cost:
    """The cost of training `params` parameters on `tokens` tokens on so many chips, each for the price `hour` an hour.

    `tokens_per_second` is that of all chips together, as `llmjax plan` estimates it and a run logs it.
    """
    hours = tokens / tokens_per_second / 3600
    return Cost(training_flops(params, tokens), hours / 24, hours * chips, hours * chips * hour)
