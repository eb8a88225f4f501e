"""Covey: large language models on the devices you already own, joined into one cluster."""
