"""Decoding: samplers, and the loop that generates text with a cache."""
