"""A runner holds what placement sets aside for it. `bench/memory.py` tells by how much it differs, for any file."""

import sys

import pytest
from runner_memory import measure

from covey.schema.model import KvCacheType


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the constants are those of Linux on x86-64")
@pytest.mark.parametrize(
    ("exact", "kv_cache", "context"), [(False, "f32", 256), (True, "f32", 256), (False, "f16", 512)]
)
def test_full_slots_take_what_was_predicted(demo_model, exact, kv_cache, context):
    """Both ends of a pipeline. The tenth leaves room for other builds of the libraries. Caches of 16-bit floats have
    as many bytes with twice the context: the most is while the weights load, whatever the caches will take.
    """
    for stage in measure(demo_model, context=context, slots=2, stages=2, exact=exact, kv_cache=KvCacheType(kv_cache)):
        print(stage)
        assert 0.9 < stage["ratio"] < 1.1
        assert stage["most_bytes"] < 1.25 * stage["predicted_bytes"]  # while it loads: the output there twice
