"""The moving digits as a tiny Wan: an autoencoder and a transformer of its own over the text of `moving_digits`."""
