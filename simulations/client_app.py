"""The ClientApp of `flwr run`."""

from fedpet.client.flower_client import make_client_app

app = make_client_app()
