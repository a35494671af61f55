"""GPT-J for TensorFlow and Keras 3."""
