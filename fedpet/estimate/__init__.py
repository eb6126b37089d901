"""Estimate a run's bytes, and its time on named links, before any training.

Nothing is loaded and nothing is trained. The backbone is built on torch's meta device, modules are
placed by the code that places them in a run, and messages are Flower's own, around made-up bytes.
The payloads of an entropy coder are measured on updates that the run's own optimiser makes of
random gradients.
"""

from fedpet.estimate.cost import Estimate, estimate
from fedpet.estimate.links import LINKS, Link, find_links
from fedpet.estimate.meta_model import outline
from fedpet.estimate.value_counts import Layout, count_values

__all__ = [
    "LINKS",
    "Estimate",
    "Layout",
    "Link",
    "count_values",
    "estimate",
    "find_links",
    "outline",
]
