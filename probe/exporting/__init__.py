"""A saved classifier in the forms that other programs read: ONNX, StableHLO, safetensors, Hugging Face."""
