"""Conformance: the acceptance cases on every family, dtype and lane; see docs/conformance.md."""
