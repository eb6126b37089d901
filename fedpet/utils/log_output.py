"""Write fedpet's own log lines where the processes of a node have no other log."""

import logging


def log_to_stderr() -> None:
    """Write the log of fedpet, from INFO on, to the standard error; Flower's has its own way."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s fedpet: %(message)s"))
    logger = logging.getLogger("fedpet")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
