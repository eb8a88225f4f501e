"""Which models can be cut into how many ranks, and that the ranks together have all of a layer."""

import pytest

from covey.checkpoints.ranks import Heads, kv_heads, portion, query_heads, rank_counts, refusal

SMOLLM2 = Heads(9, 3, 64), 1536
LLAMA_1B = Heads(32, 8, 64), 8192


def test_whole_groups_of_heads_or_shares_of_one_group() -> None:
    assert rank_counts("llama", *SMOLLM2) == (1, 3, 9)
    assert rank_counts("llama", *LLAMA_1B) == (1, 2, 4, 8, 16, 32)
    assert rank_counts("llama", Heads(4, 1, 256), 6912) == (1, 2, 4)
    assert rank_counts("llama", Heads(6, 6, 64), 512) == (1, 2, 3, 6)
    assert rank_counts("qwen2", Heads(12, 2, 128), 8960) == (1, 2, 4, 6, 12)


def test_what_limits_it_beside_the_heads() -> None:
    assert rank_counts("olmo2", *LLAMA_1B) == (1,)
    assert rank_counts("llama", Heads(8, 8, 64), 48) == (1, 2)  # three blocks, and no count of 3 for the heads
    assert rank_counts("llama", Heads(8, 8, 8), 512) == (1, 2, 4)  # one head of 8 values is no whole block
    assert rank_counts("llama", Heads(1, 1, 64), 8) == (1,)


def test_a_refusal_names_what_is_possible() -> None:
    assert refusal("llama", *SMOLLM2, 3) is None
    reason = refusal("llama", *SMOLLM2, 2)
    assert reason is not None
    assert "9 query heads, 3 key-value heads" in reason
    assert reason.endswith("can't be cut into 2 ranks; possible is 3 or 9")
    assert "olmo2" in (refusal("olmo2", *LLAMA_1B, 2) or "")
    assert (refusal("llama", Heads(1, 1, 64), 512, 2) or "").endswith("possible is none but 1")


@pytest.mark.parametrize("heads", [Heads(9, 3, 64), Heads(32, 8, 64), Heads(12, 2, 128), Heads(8, 1, 64)])
def test_each_query_head_is_with_its_key_value_head(heads: Heads) -> None:
    group = heads.query_count // heads.kv_count
    for count in rank_counts("llama", heads, 1 << 14):
        queries = [head for rank in range(count) for head in query_heads(heads, rank, count)]
        assert queries == list(range(heads.query_count))
        for rank in range(count):
            own, keys = query_heads(heads, rank, count), kv_heads(heads, rank, count)
            assert {head // group for head in own} == set(keys)
            assert len(own) % len(keys) == 0
            assert [keys[at // (len(own) // len(keys))] for at in range(len(own))] == [head // group for head in own]


@pytest.mark.parametrize(("size", "unit"), [(1536, 32), (96, 16), (11008, 128), (100, 16), (49152, 16)])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_portions_are_all_of_it_and_about_equal(size: int, unit: int, count: int) -> None:
    parts = [portion(size, unit, rank, count) for rank in range(count)]
    assert [each for part in parts for each in part] == list(range(size))
    assert all(part.start % unit == 0 for part in parts)
    assert max(map(len, parts)) - min(map(len, parts)) <= 2 * unit
