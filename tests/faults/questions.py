"""What is asked while something breaks, and what is answered when nothing does."""

from itertools import count, islice

from reference import SLOTS, Reference

TOKENS = 80
SETS = 3  # the slots of a head hold what was asked last; what was asked before that is read anew


class Questions:
    """Prompts whose answers do not end by themselves within `TOKENS` tokens, in sets that are asked at once."""

    def __init__(self, reference: Reference) -> None:
        self.reference = reference
        self.answers: dict[str, list[int]] = {}
        self._numbers = count(1)
        self._sets: list[list[str]] = []

    def of_round(self, number: int) -> list[str]:
        """Those of round 0, 1, 2 ... in one cluster."""
        while len(self._sets) <= number % SETS:
            self._sets.append(self._set())
        return self._sets[number % SETS]

    def _set(self) -> list[str]:
        found: dict[str, list[int]] = {}
        while len(found) < SLOTS:
            prompts = [f"Number {number}: write a very long story." for number in islice(self._numbers, SLOTS)]
            answers = self.reference.answers(prompts, TOKENS)
            stops = self.reference.text.stop_token_ids
            found |= {each: said for each, said in zip(prompts, answers, strict=True) if not stops.intersection(said)}
        chosen = dict(islice(found.items(), SLOTS))
        self.answers |= chosen
        return list(chosen)
