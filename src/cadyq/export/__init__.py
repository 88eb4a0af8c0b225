"""Networks for other tools: ONNX files, and the Hugging Face hub."""
