"""The nouns and messages that all rooms share, without behaviour."""
