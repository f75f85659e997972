"""The noun: intervention graphs as frozen data. Nothing here imports torch."""
