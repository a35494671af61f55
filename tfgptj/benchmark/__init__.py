"""Benchmarks of models on the machine at hand, beside what its memory allows."""
