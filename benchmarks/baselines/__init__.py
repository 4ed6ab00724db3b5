"""Small re-implementations of published methods, to stand in the same tables."""
