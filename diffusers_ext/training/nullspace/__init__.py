"""Runs of null-space DreamBooth."""
