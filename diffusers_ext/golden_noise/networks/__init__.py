"""Networks from random to golden noise."""
