"""Evaluation: what a trained model reaches, and what else there is to compare it with."""
