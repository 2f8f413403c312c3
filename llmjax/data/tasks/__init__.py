"""Synthetic tasks: rows of symbols with known answers, each made from a random generator alone."""
