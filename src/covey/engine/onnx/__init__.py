"""The engine on ONNX Runtime: one graph per stage, built from a GGUF file's tensors."""
