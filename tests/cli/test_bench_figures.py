"""What rounds come to, from answers written down by hand; and prompts of the length that was asked for."""

from xml.etree import ElementTree as ET

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from covey.cli.benching.asking import Sample
from covey.cli.benching.cluster import Chosen, hardware
from covey.cli.benching.figures import MEASURES, Case, Round, figures, medians, percentile, ratios
from covey.cli.benching.measuring import Plan, Results
from covey.cli.benching.picture import draw
from covey.cli.benching.prompts import WORDS, Prompts, Tokens
from covey.cli.benching.showing import Setting, headings, missing, notes, number, table
from covey.cli.client import CliError
from covey.cli.tables import node_names
from tests.api.fake_backend import FakeBackend

SVG = "{http://www.w3.org/2000/svg}"


PLAN = Plan((Case(100, 11, 1), Case(100, 11, 8)), repeats=3, warm_ups=1)


def setting() -> Setting:
    state = FakeBackend().current
    model = Chosen(state.instances)
    return Setting(
        model=model, names=node_names(state), machines=hardware(state, model), plan=PLAN, seed=1, shared_tokens=0
    )


def sample(*pieces_s: float, sent_s: float = 0.0, prompt: int = 100, cached: int = 0, new: int | None = None) -> Sample:
    return Sample(
        sent_s=sent_s,
        pieces_s=pieces_s,
        ended_s=pieces_s[-1] if pieces_s else sent_s + 1,
        prompt_tokens=prompt,
        cached_tokens=cached,
        new_tokens=len(pieces_s) if new is None else new,
    )


def measured(speed: float) -> Round:
    """One answer of 11 tokens that comes `speed` times as fast as in a second for the prompt, one for the rest."""
    pieces = [(1 + place / 10) / speed for place in range(11)]
    return Round((sample(*pieces),), memory_bytes=int(1e9 / speed))


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=30), st.floats(0, 1))
def test_percentiles_are_those_of_numpy(values: list[float], share: float) -> None:
    assert percentile(values, share) == pytest.approx(np.quantile(values, share), rel=1e-9, abs=1e-6)


def test_one_request() -> None:
    found = figures(measured(2))
    assert found == {
        "prefill": pytest.approx(200),  # 100 tokens in half a second
        "decode": pytest.approx(20),  # 10 after the first in half a second
        "total": pytest.approx(111),
        "first_token": pytest.approx(500),
        "token_p50": pytest.approx(50),
        "token_p95": pytest.approx(50),
        "token_p99": pytest.approx(50),
        "memory": pytest.approx(500),
    }


def test_two_requests_at_once() -> None:
    """The second is read after the first, and its answer ends last."""
    both = Round((sample(1.0, 1.5, 3.0), sample(2.0, 2.5, 4.1, sent_s=0.1)), memory_bytes=0)
    found = figures(both)
    assert found["prefill"] == pytest.approx(200 / 2.0)
    assert found["decode"] == pytest.approx(4 / 3.1)
    assert found["total"] == pytest.approx(206 / 4.1)
    assert found["first_token"] == pytest.approx(1000 * (1.0 + 1.9) / 2)
    assert found["token_p50"] == pytest.approx(1000 * (0.5 + 1.5) / 2)
    assert found["memory"] is None


def test_what_came_from_a_cache_was_not_read() -> None:
    """A short prompt, of which the template takes the most: it would else look several times as fast as it is."""
    found = figures(Round((sample(0.5, cached=75),), memory_bytes=0))
    assert found["prefill"] == pytest.approx(25 / 0.5)
    assert found["total"] == pytest.approx(101 / 0.5)  # what was done for whoever asked, however
    assert figures(Round((sample(0.5, cached=100),), memory_bytes=0))["prefill"] is None


def test_what_has_no_time_between_two_tokens_says_so() -> None:
    one = Round((sample(1.0),), memory_bytes=1)
    assert [figures(one)[name] for name in ("decode", "token_p50", "token_p99")] == [None] * 3
    silent = Round((sample(new=5),), memory_bytes=1)  # its tokens have no text: an unfinished character
    assert figures(silent)["prefill"] is figures(silent)["first_token"] is None
    assert figures(silent)["total"] == pytest.approx(105)
    assert number(None) == "-"


def test_rounds_are_compared_in_pairs_and_more_than_one_is_always_better() -> None:
    """The machine was twice as slow in the second round, for both."""
    ours, theirs = [measured(2), measured(1), measured(3)], [measured(1), measured(0.5), measured(1)]
    assert medians(ours)["total"] == pytest.approx(55.5 * 2 / 1)
    for name, ratio in ratios(ours, theirs).items():
        assert ratio is not None, name
        assert (ratio.median, ratio.least, ratio.most) == pytest.approx((2, 2, 3), rel=1e-6), name


def test_the_picture_has_a_bar_for_each_figure_and_its_text_is_no_markup() -> None:
    case, many = Case(100, 11, 1), Case(100, 11, 8)
    results: Results = {each: [{"covey": measured(2), "llama.cpp": measured(1)}] * 3 for each in (case, many)}
    picture = ET.fromstring(draw(["a < b & c", "on attic"], results))  # noqa: S314 (our own)
    texts = [text.text for text in picture.iter(f"{SVG}text")]
    assert texts[:2] == ["a < b & c", "on attic"]
    assert {"covey", "llama.cpp", str(case), str(many)} <= set(texts)
    bars = [box for box in picture.iter(f"{SVG}rect") if box.get("x") == "250.0" and box.get("y") != "64.0"]
    assert len(bars) == 2 * 2 * len(MEASURES)
    _, _, width, height = map(float, picture.attrib["viewBox"].split())
    for box in picture.iter(f"{SVG}rect"):
        assert float(box.attrib["x"]) + float(box.attrib["width"]) <= width
        assert float(box.attrib["y"]) + float(box.attrib["height"]) <= height


def test_the_picture_leaves_out_what_nobody_measured() -> None:
    picture = draw(["one"], {Case(100, 1, 1): [{"covey": Round((sample(1.0),), memory_bytes=0)}]}).decode()
    assert "prefill" in picture
    assert "decode" not in picture
    assert "memory" not in picture


def test_words_of_another_style_stand_apart_by_more_than_a_space() -> None:
    """Some programs that draw drop a space where an element begins."""
    picture = ET.fromstring(draw(["one"], {Case(100, 11, 1): [{"covey": measured(1)}]}))  # noqa: S314 (our own)
    spans = list(picture.iter(f"{SVG}tspan"))
    assert len(spans) == len(MEASURES)
    assert all(float(span.attrib["dx"]) > 0 for span in spans)


def test_what_ended_early_says_so_in_table_and_picture() -> None:
    """The second of two cases came to its second round of three; and in another run to none."""
    one, many = PLAN.cases
    done = [{"covey": measured(1)}] * 3
    assert missing(PLAN, {one: done, many: done}) == []
    begun: Results = {one: done, many: done[:2]}
    assert missing(PLAN, begun) == ["Ended early, with 2 of 3 rounds of 100 + 11 tokens, 8 at once."]
    assert [row[0] for row in table(PLAN, begun).rows if row[0]] == [str(one), "3 rounds", str(many), "2 of 3 rounds"]
    assert missing(PLAN, {one: done}) == ["Ended early, with 0 of 3 rounds of 100 + 11 tokens, 8 at once."]
    assert table(PLAN, {one: done}).rows[-1] == (str(many), "0 of 3 rounds", "-")
    assert missing(PLAN, begun)[0] in headings(setting(), begun)
    assert missing(PLAN, begun)[0] in notes(PLAN, begun, is_shared=False)


def test_the_picture_says_what_was_measured_on_what() -> None:
    """Two machines that are alike."""
    whole: Results = {case: [{"covey": measured(1)}] * 3 for case in PLAN.cases}
    assert headings(setting(), whole) == [
        "Tiny-Chat",
        "on anna and berta",
        "2 machines: Test CPU, 2 cores",
        "bars: medians of 3 rounds; thin lines: from the least of them to the most",
    ]


def test_the_table_tells_the_worst_and_the_best_round() -> None:
    rounds = [{"covey": measured(2 * speed), "llama.cpp": measured(1)} for speed in (1, 2, 3)]
    listing = table(Plan((Case(100, 11, 8),), 3, 1), {Case(100, 11, 8): rounds})
    assert listing.titles == ("case", "measure", "covey", "llama.cpp", "times as good")
    assert listing.rows[2] == ("", "total, tokens/s", "222", "55.5", "4.00 (2.00 to 6.00)")
    assert [row[0] for row in listing.rows] == ["100 + 11 tokens, 8 at once", "3 rounds", *[""] * 6]


# ---- prompts ----


def counted(prompt: str) -> int:
    """A template of 30 tokens, words of one and a full stop of another."""
    return 30 + len(prompt.replace(".", " .").split())


def test_prompts_have_the_length_that_was_asked_for_and_no_two_are_alike() -> None:
    prompts = Prompts(1, counted)
    assert prompts.tokens == Tokens(template=30, per_word=1)
    made = [prompts.of(tokens) for tokens in (31, 64, 512, 512, 512)]
    assert [counted(prompt) for prompt in made] == [31, 64, 512, 512, 512]
    assert len({prompt[:40] for prompt in made[1:]}) == 4  # so that nothing but the template is in a cache
    assert set(made[2].replace(".", "").split()) <= set(WORDS)
    assert Prompts(1, counted).of(31) == made[0]
    assert Prompts(2, counted).of(512) != made[2]


def test_words_may_take_more_than_a_token() -> None:
    prompts = Prompts(1, lambda prompt: 5 + 4 * len(prompt.replace(".", " .").split()))
    assert prompts.tokens == Tokens(template=5, per_word=4)
    assert len(prompts.of(205).replace(".", " .").split()) == 50


def test_a_shared_prefix_is_the_beginning_of_all() -> None:
    prompts = Prompts(1, counted, shared_tokens=100)
    first, second = prompts.of(200), prompts.of(200)
    same = next(place for place, (one, other) in enumerate(zip(first, second, strict=False)) if one != other)
    assert counted(first) == counted(second) == 200
    assert counted(first[:same]) in range(130, 133)  # one word more is alike once in 350 times


@pytest.mark.parametrize(
    ("count_tokens", "shared", "sentence"),
    [
        (counted, 0, "A prompt of 10 tokens is too short: .* one word takes 31. Ask for 31 at least."),
        (counted, 600, "A prompt of 10 tokens is too short"),
        (lambda _: 7, 0, "The server counts no tokens of a prompt"),
    ],
)
def test_what_no_prompt_can_be_is_one_sentence(count_tokens: object, shared: int, sentence: str) -> None:
    with pytest.raises(CliError, match=sentence):
        Prompts(1, count_tokens, shared).of(10)  # type: ignore[arg-type]


def test_a_shared_prefix_leaves_room_for_a_word() -> None:
    with pytest.raises(CliError, match="leaves no room for anything else in a prompt of 512 tokens"):
        Prompts(1, counted, shared_tokens=600).of(512)
