"""Training and the runs around it, as a library and as command lines."""
