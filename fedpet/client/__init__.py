"""Run one node: store plans and client state, train its clients."""
