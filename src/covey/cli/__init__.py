"""A client of the HTTP API in a terminal."""
