"""Recording: user code becomes a `Graph`. Nothing here runs a model."""
