"""ONNX export, parity check and measurements in ONNX Runtime."""
