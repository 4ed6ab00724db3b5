"""Runs of the concept eraser."""
