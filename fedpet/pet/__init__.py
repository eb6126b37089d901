"""Configure, build, hold and save the trainable part of a model."""
