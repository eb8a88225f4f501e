"""The seeded world for `control`: machines of a small cluster, with a clock, a network, processes and people of its
own.

Everything that happens follows from a seed. `python -m simulation --seed 7 --trace` shows one run.
"""
