"""Checkpoints: weight files read, written, and matched with the variables of a model."""
