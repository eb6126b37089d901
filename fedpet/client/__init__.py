"""One node: it keeps plans and client state, and trains its clients."""
