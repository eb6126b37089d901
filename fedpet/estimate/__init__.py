"""What a run costs in bytes and in time, before any training.

    outline -> layout -> draws -> rules -> updates -> downlink -> messages -> cost

and links beside it

In:  an experiment; of its backbone the configuration alone, of its data the clients alone.
Out: an `Estimate`: values, bytes of every message, the run's total, seconds on named links.

Nothing is loaded and nothing is trained. The backbone is built on torch's meta device, modules are
placed by the code that places them in a run, and messages are Flower's own, around made-up bytes.
What a codec's entropy stage makes of real updates is not known beforehand: `updates` draws
updates as the optimiser would make them of random gradients, and has the codec encode those.
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
