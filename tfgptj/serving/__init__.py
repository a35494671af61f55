"""Serving: SavedModels that take text and give text, with TensorFlow alone."""
