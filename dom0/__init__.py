"""The first domain and the driver domains: toolstack, store, consoles, block and network backends, policy."""
