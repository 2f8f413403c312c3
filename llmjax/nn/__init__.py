"""Flax Linen modules; each file holds a config dataclass and the thin module that it builds."""
