"""Synthetic tasks: rows of token ids with known answers, made from (seed, split, step, row) alone."""
