"""fedpet: federated parameter-efficient fine-tuning on Flower.

    backbone -> mask -> structure -> search -> model -> codec
             -> plan -> client -> strategy -> ledger -> report

Each stage is a module of that name. This one imports none of them, so that the command line
answers `--help` without waiting for torch.
"""

__version__ = "0.1.0"

__all__ = ["__version__"]
