"""A client's epochs in plain torch. Knows no Flower."""
