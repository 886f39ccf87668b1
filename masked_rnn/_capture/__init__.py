"""What torch.compile, torch.export and ONNX see of a layer."""
