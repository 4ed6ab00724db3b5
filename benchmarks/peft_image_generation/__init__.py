"""PEFT's image generation benchmark with a null-space LoRA: training, scoring, and what it costs."""
