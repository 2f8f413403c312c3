"""Tests of llmjax and pallas_kernels."""
