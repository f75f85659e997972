"""The handles: a family, a recorder and a backend wired together."""
