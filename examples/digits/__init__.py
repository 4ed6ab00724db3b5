"""A Stable Diffusion that draws tinted handwritten digits: its data, its judge, its training script, its weights."""
