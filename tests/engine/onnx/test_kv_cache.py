"""The cache takes memory as it fills, not when a slot is first used."""

import psutil

from covey.engine.onnx.session import KvCache

SLOTS, HEADS, CONTEXT, HEAD_SIZE = 4, 8, 8192, 64  # 2 MiB for each slot and head, the size of a huge page
MEGABYTE = 10**6


def test_a_short_answer_takes_the_memory_of_a_short_answer() -> None:
    before = psutil.Process().memory_info().rss
    cache = KvCache(("key", "value"), (SLOTS, HEADS, CONTEXT, HEAD_SIZE))
    for array in cache.slices(0, SLOTS).values():
        assert not array[:, :, :16].any()
        array[:, :, :16] = 1.0  # sixteen tokens
    grown = psutil.Process().memory_info().rss - before
    assert grown < 4 * MEGABYTE  # 128 MB with huge pages
