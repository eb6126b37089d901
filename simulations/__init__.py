"""The same federation simulated on Ray, or run by `flwr run`. Installed as `fedpet.simulations`."""
