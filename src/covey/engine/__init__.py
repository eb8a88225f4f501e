"""Turns numbers into numbers, unaware of any cluster: the runner process."""
