"""The digits model distilled to one to four steps without guidance: its training script, its log, its weights."""
