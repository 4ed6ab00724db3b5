"""Training scripts and the parts they share; `accelerate launch training/<script>.py` runs one."""
