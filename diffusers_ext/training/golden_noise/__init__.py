"""Runs of golden noise: pairs, networks, pictures."""
