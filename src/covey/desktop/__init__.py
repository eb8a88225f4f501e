"""How a desktop starts a node and keeps it running: service files, who reads them, and the macOS bundle."""
