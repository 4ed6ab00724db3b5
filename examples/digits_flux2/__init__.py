"""The digits as a tiny FLUX.2: a transformer of its own over the autoencoder and the text encoder of `digits`."""
