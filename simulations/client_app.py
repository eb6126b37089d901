"""The ClientApp of `flwr run`."""

from pathlib import Path

from fedpet.client.flower_client import make_client_app

app = make_client_app(app=Path(__file__).parents[1])
