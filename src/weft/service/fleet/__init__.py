"""The processes of one server: starts them, watches them, ends them."""
