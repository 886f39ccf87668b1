"""The forms in which torch.compile, torch.export and the ONNX exporter capture a layer."""
