"""Translates foreign dialects: parse and render, pure; one file knows the web framework."""
