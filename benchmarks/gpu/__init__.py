"""Parts of `benchmarks/on_gpu.py`: what costs on a GPU at the published sizes, with random weights."""
