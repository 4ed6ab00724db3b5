"""Null-space DreamBooth: teach a subject along directions that existing knowledge does not use."""
