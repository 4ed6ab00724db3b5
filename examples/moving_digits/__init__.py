"""The bundled CogVideoX that learned moving digits: its data, its judge, how it was trained."""
