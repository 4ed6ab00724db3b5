"""The eraser as a tuner of PEFT: config, layer, model, outputs."""
