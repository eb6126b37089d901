"""Write everything that a federation on real machines needs into one folder.

It holds a folder `server/` and a folder a node, each to be copied to its machine as it is.
"""

from fedpet.deploy.deployment import Deployment, NodeSpec, write_deployment

__all__ = ["Deployment", "NodeSpec", "write_deployment"]
