"""What a process of the server may still do once strangers' graphs come in. See `confine`."""
