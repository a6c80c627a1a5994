"""Calibrated quantization: the text, the rounding of a matrix, the layers of a model one by one, and the report."""
