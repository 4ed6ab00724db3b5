"""What the erased model learns from: runs of the model without its eraser."""
