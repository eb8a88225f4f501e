"""Who judges must be able to say no: each mistake that a resumed answer could have is found."""

from collections.abc import Callable

import pytest
from questions import Questions
from reference import judge

BREAK = 60  # tokens, then another head read all of them at once


@pytest.fixture(scope="module")
def resumed(questions: Questions) -> tuple[str, list[int], list[int], list[int]]:
    """A prompt, its undisturbed answer, one that went on elsewhere, and how much each of its heads read."""
    reference, (prompt, *_) = questions.reference, questions.of_round(0)
    undisturbed = questions.answers[prompt]
    told = undisturbed[:BREAK]
    row = reference._read(0, [*reference.prompt_ids(prompt), *told])
    while len(told) < len(undisturbed):
        told.append(int(row.argmax()))
        row = reference._next({0: (len(reference.prompt_ids(prompt)) + len(told) - 1, told[-1])})[0]
    length = len(reference.prompt_ids(prompt))
    return prompt, undisturbed, told, [length, length + BREAK]


def test_an_answer_that_went_on_is_right(
    questions: Questions, resumed: tuple[str, list[int], list[int], list[int]]
) -> None:
    judged = judge(questions.reference, *resumed)
    assert (judged.wrong, judged.near) == ("", 0)
    prompt, undisturbed, _, _ = resumed
    assert judge(questions.reference, prompt, undisturbed, undisturbed[:70], []).wrong == ""


def test_an_answer_may_part_from_another_between_tokens_that_are_equally_good(questions: Questions) -> None:
    """As happens where some of its tokens were guessed, and so read together with others."""
    reference, prompts = questions.reference, questions.of_round(0)
    parted = (nearly(questions, prompt, place) for prompt in prompts for place in range(20, BREAK))
    prompt, told = next(each for each in parted if each is not None)
    assert judge(reference, prompt, questions.answers[prompt], told, []).wrong == ""


def nearly(questions: Questions, prompt: str, place: int) -> tuple[str, list[int]] | None:
    """The beginning of an answer that ends with another token, where that is nearly as good."""
    told = questions.answers[prompt][:place]
    row = questions.reference._read(0, [*questions.reference.prompt_ids(prompt), *told])
    row[questions.answers[prompt][place]] -= 0.2
    best = int(row.argmax())
    return None if best == questions.answers[prompt][place] else (prompt, [*told, best])


MISTAKES: dict[str, Callable[[list[int]], list[int]]] = {
    "a token is lost": lambda told: told[:BREAK] + told[BREAK + 1 :],
    "a token is doubled": lambda told: told[: BREAK + 1] + told[BREAK:-1],
    "the last one is told again": lambda told: told[:BREAK] + told[BREAK - 1 : -1],
    "two change places": lambda told: [*told[:BREAK], told[BREAK + 1], told[BREAK], *told[BREAK + 2 :]],
    "the answer begins anew": lambda told: told[:BREAK] + told[:BREAK],
    "one before the fault was another": lambda told: [*told[:7], told[8], *told[8:]],
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_found(
    questions: Questions, resumed: tuple[str, list[int], list[int], list[int]], mistake: str
) -> None:
    prompt, undisturbed, told, read_again = resumed
    assert judge(questions.reference, prompt, undisturbed, MISTAKES[mistake](told), read_again).wrong != ""
