"""The gate: what makes a domain a domain. Filter, monitor, the order of locking."""
