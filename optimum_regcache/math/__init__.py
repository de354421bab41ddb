"""Numbers of quantization as pure functions: tensors in, tensors out."""
