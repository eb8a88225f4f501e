"""A client's stop string ends the answer right before it, wherever tokens happen to cut it."""

from hypothesis import example, given
from hypothesis import strategies as st

from covey.text.stop import StopStrings

STOPS = st.lists(st.text("ab<|", min_size=1, max_size=4), max_size=3)
CHUNKS = st.lists(st.text("ab<|x", max_size=4), max_size=12)


def dumb(stops: list[str], text: str) -> tuple[str, bool]:
    """Looks after every character whether a stop string has just been completed, the longest first."""
    for end in range(1, len(text) + 1):
        for stop in sorted(stops, key=len, reverse=True):
            if text[:end].endswith(stop):
                return text[: end - len(stop)], True
    return text, False


def streamed(stops: list[str], chunks: list[str]) -> tuple[list[str], bool]:
    watcher = StopStrings(stops)
    shown: list[str] = []
    for chunk in chunks:
        text, stopped = watcher.push(chunk)
        shown.append(text)
        if stopped:
            assert watcher.finish() == ""
            return shown, True
    return [*shown, watcher.finish()], False


@given(STOPS, CHUNKS)
@example(["abab"], ["aba", "bab"])
@example(["b", "ab|"], ["ab", "|"])
@example(["aab"], ["a", "a", "a", "b"])
def test_the_answer_is_that_of_the_dumb_twin(stops: list[str], chunks: list[str]) -> None:
    shown, stopped = streamed(stops, chunks)
    assert ("".join(shown), stopped) == dumb(stops, "".join(chunks))


@given(STOPS, CHUNKS)
def test_no_more_is_held_back_than_could_begin_a_stop_string(stops: list[str], chunks: list[str]) -> None:
    watcher = StopStrings(stops)
    come = shown = ""
    for chunk in chunks:
        come += chunk
        text, stopped = watcher.push(chunk)
        shown += text
        if stopped:
            return
        held = come.removeprefix(shown)
        assert come == shown + held
        assert held == "" or any(stop.startswith(held) and stop != held for stop in stops)


def test_without_stop_strings_nothing_is_held_back() -> None:
    assert StopStrings([]).push("abc") == ("abc", False)
    assert StopStrings([""]).push("abc") == ("abc", False)


def test_text_after_a_stop_string_is_dropped() -> None:
    watcher = StopStrings(["\n\nUser:"])
    assert watcher.push("Paris.\n") == ("Paris.", False)
    assert watcher.push("\nUser: and") == ("", True)
    assert watcher.finish() == ""
