"""The Flower App of fedpet, for `flwr run .`, and the built-in experiments."""
