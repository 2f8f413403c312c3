"""Quantisation: number formats, quantised tensors, post-training methods and training against rounding."""
