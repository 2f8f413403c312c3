"""The training loop and what it is made of: optimizers, schedules, precision, averaging, stopping."""
