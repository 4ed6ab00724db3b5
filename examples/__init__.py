"""Short, tested uses of diffusers_ext and the small models that come with it."""
