"""Prices graphs, and knows models without their weights."""
