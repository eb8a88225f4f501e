"""How fast a model answers, measured as a client sees it: over HTTP, and beside another server where one is named."""
