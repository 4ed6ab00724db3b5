"""Sets of noise pairs: reading, writing, sharing."""
