"""Layouts of Hugging Face, a page per family: the table of its weights, and its configuration there and back."""
