"""Text generation: parameters, logits processors, the compiled loop, streaming."""
