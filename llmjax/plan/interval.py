"""How often to save a run that fails now and then."""

import math


def checkpoint_every(steps: int, save: float, again: float, failures: float = 1.0) -> int:
    """The steps between two checkpoints that lose the least time over a run of `steps` steps.

        cost(k) = (T / k) save + F (k / 2) again,    k* = sqrt(2 T save / (F again))

    A save costs `save` seconds, a step done again after a failure `again` seconds, and there are `failures` of them on
    average, each losing half an interval (Young 1974, A first order approximation to the optimum checkpoint interval).
    """
    best = math.sqrt(2 * steps * save / (failures * again))
    around = (math.floor(best), math.ceil(best))
    return min((min(max(k, 1), steps) for k in around), key=lambda k: lost(k, steps, save, again, failures))


def lost(every: int, steps: int, save: float, again: float, failures: float = 1.0) -> float:
    """Seconds spent on saving every so many steps and on doing steps again: cost(k) above."""
    return steps / every * save + failures * every / 2 * again
