"""The trainable part of a model: its configuration, how it is put on a model, and its files."""
