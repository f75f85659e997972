"""SERVING: a model that is loaded once, and many people's graphs. `weft serve` is the way in."""
