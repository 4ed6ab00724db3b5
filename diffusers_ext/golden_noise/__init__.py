"""Noise that suits the prompt: targets, networks that predict them, pipelines that use them."""
