"""Training scripts of diffusers_ext and the parts they share; run them with `accelerate launch training/<script>.py`."""
