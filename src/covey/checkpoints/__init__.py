"""Knowledge about model files, true on any machine."""
