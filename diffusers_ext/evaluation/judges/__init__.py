"""Models that say what a video shows."""
