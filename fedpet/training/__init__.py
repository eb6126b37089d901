"""Train and evaluate in plain torch: loop, loss, optimiser, metrics. Knows no Flower."""
