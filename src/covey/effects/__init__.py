"""Touches the world and decides nothing."""
