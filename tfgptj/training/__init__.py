"""Training: tf.data pipelines and recipes around Keras's own `fit`."""
