"""Training by several processes, on PyTorch's own distributed engine."""
