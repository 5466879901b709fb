"""What leaves: ONNX, pt2, costs of a size."""
