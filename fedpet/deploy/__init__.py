"""A federation on real machines: everything the server and each node need, in one folder.

    certificates, keys -> app -> scripts, services -> folder

In:  an experiment, the server's address, the nodes' names.
Out: a folder `server/` and a folder a node, each to be copied to its machine as it is.
"""

from fedpet.deploy.deployment import Deployment, NodeSpec, write_deployment

__all__ = ["Deployment", "NodeSpec", "write_deployment"]
