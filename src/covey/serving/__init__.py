"""One request's life, from text to text."""
