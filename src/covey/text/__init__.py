"""Text work without input or output: templates, detokenising, stop strings."""
