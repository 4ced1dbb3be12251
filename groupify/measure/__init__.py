"""Time and memory in ONNX Runtime and PyTorch: models, single convs, latency tables."""
