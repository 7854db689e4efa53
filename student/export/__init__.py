"""A finished student as files that other programs run: ONNX, with class names and views inside."""
