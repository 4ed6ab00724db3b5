"""Files of erasers: formats, reading, writing."""
