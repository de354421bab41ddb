"""Vision encoders of transformers: the table of families, towers found in models, what can be quantized in them."""
