"""An objective over tokens, of a model that reads the batch's images too."""

from dataclasses import dataclass
from functools import partial

from jaxtyping import Array, Float, PRNGKeyArray

from llmjax.nn.metric import Metric
from llmjax.nn.model import Params
from llmjax.objectives.base import Apply, Batch, Objective
from llmjax.objectives.next_token import NextToken


@dataclass(frozen=True)
class WithImages(Objective):
    """`objective`, with the batch's `images` `[batch, side, side, channels]` given to the model beside its tokens.

    Visual instruction tuning (Liu et al. 2023, 2304.08485) is NextToken with images and a loss mask on the answers.
    """

    objective: Objective = NextToken()
    """the loss"""

    def loss(
        self, apply: Apply, params: Params, batch: Batch, key: PRNGKeyArray | None
    ) -> tuple[Float[Array, ""], dict[str, Metric]]:
        """The objective's loss and metrics."""
        return self.objective.loss(partial(apply, images=batch["images"]), params, batch, key)
