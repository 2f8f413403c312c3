"""Optimizers as configs, one method a file; all of them are optax transformations underneath."""

from llmjax.train.optimizers.adafactor import Adafactor
from llmjax.train.optimizers.adam import Adam, AdamW
from llmjax.train.optimizers.base import Group, Optimizer, set_learning_rate
from llmjax.train.optimizers.gated_adamw import GatedAdamW
from llmjax.train.optimizers.lion import Lion
from llmjax.train.optimizers.lora_plus import lora_plus
from llmjax.train.optimizers.muon import Muon
from llmjax.train.optimizers.rank_budget import RankBudgetAdamW
from llmjax.train.optimizers.rmsprop import RMSprop
from llmjax.train.optimizers.schedule_free import ScheduleFree
from llmjax.train.optimizers.sgd import SGD
from llmjax.train.optimizers.sophia import Sophia

__all__ = [
    "SGD",
    "Adafactor",
    "Adam",
    "AdamW",
    "GatedAdamW",
    "Group",
    "Lion",
    "Muon",
    "Optimizer",
    "RMSprop",
    "RankBudgetAdamW",
    "ScheduleFree",
    "Sophia",
    "lora_plus",
    "set_learning_rate",
]
