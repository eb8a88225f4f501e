"""An answer that is held to a schema, a pattern or a grammar is what it has to be, and nobody else's answer changes."""

import json
import re
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from tiny_model import VOCABULARY, write_model

from covey.checkpoints.gguf_file import read_header
from covey.checkpoints.tokenizer import TextTokenizer, load_tokenizer
from covey.engine.contract import Piece
from covey.engine.grammar import CHARACTERS_MAX, ConstraintError, check, deep_thread
from covey.engine.plan import Remark, SamplingStart, StepPlan
from covey.engine.sampler import Sampler
from covey.schema.generation import Admit, Broken, Constraint, ConstraintKind, Ended, FinishReason, Sampling
from tests.engine.harness import Client, make_admit, pipeline, sampled

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
STOP = VOCABULARY - 1
LEVELS = 25


def schema(value: object) -> Constraint:
    return Constraint(ConstraintKind.JSON_SCHEMA, json.dumps(value), "schema")


def regex(pattern: str) -> Constraint:
    return Constraint(ConstraintKind.REGEX, pattern, "pattern")


def grammar(text: str) -> Constraint:
    return Constraint(ConstraintKind.GRAMMAR, text, "grammar")


DOUBLING = grammar("start: A0\n" + "".join(f"A{i}: A{i + 1} A{i + 1}\n" for i in range(LEVELS)) + f'A{LEVELS}: "a"?\n')
SUM = grammar('start: number ("+" number)+\nnumber: /[1-9][0-9]{0,3}/')


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("tiny") / "model.gguf")


@pytest.fixture(scope="module")
def tokenizer(model: Path) -> TextTokenizer:
    return load_tokenizer(read_header(model))


def random_logits(seed: int) -> NDArray[np.float32]:
    return (np.random.default_rng(seed).standard_normal(VOCABULARY) * 3).astype(np.float32)


class Run:
    """Slots that a sampler fills, each with logits of its own; what is late is asked for again."""

    def __init__(self, model: Path) -> None:
        self.sampler = Sampler(str(model))
        self.tokens: dict[int, list[int]] = {}
        self.ended: set[int] = set()
        self._begun: list[SamplingStart] = []

    def begin(self, slot: int, sampling: Sampling, generated: Sequence[int] = ()) -> None:
        self.tokens[slot] = list(generated)
        self._begun.append(SamplingStart(slot, sampling, (), tuple(generated)))

    def step(self, slots: Sequence[int]) -> dict[int, Remark]:
        """One token for each slot. Returns the remarks, by slot."""
        pieces = tuple(Piece(slot, len(self.tokens[slot]), 1, wants_logits=True) for slot in slots)
        logits = np.stack([random_logits(1000 * slot + len(self.tokens[slot])) for slot in slots])
        outcome = self.sampler.sample(StepPlan(1, pieces, tuple(self._begun)), logits)
        self._begun.clear()
        for slot, token_id in zip(slots, outcome.token_ids, strict=True):
            if token_id == STOP:
                self.ended.add(slot)
            elif token_id is not None:
                self.tokens[slot].append(token_id)
        return {slots[place]: remark for place, remark in outcome.remarks.items()}

    def finish(self, steps: int = 400) -> None:
        for _ in range(steps):
            if left := [slot for slot in self.tokens if slot not in self.ended]:
                assert all(remark.is_late for remark in self.step(left).values())


def test_each_row_is_held_to_its_own_constraint_and_a_free_one_to_none(model: Path, tokenizer: TextTokenizer) -> None:
    """Random logits say anything: only the masks make an answer of it. All in one batch, greedy and drawn."""
    run, alone = Run(model), Run(model)
    run.begin(0, Sampling(seed=1, constraint=schema(PERSON)))
    run.begin(1, Sampling(temperature=0, constraint=regex("(yes|no), [a-z]{5} 🐦")))
    run.begin(2, Sampling(seed=3, constraint=SUM, repetition_penalty=1.5, top_p=0.9, min_p=0.01))
    for free in (run, alone):
        free.begin(3, Sampling(seed=4, logit_bias={STOP: -100}))
    run.finish()
    alone.finish()
    answers = [tokenizer.decode(tokens) for tokens in run.tokens.values()]
    print(answers[:3])
    assert run.ended == {0, 1, 2}
    person = json.loads(answers[0])
    assert list(person) == ["name", "age"]
    assert 0 <= person["age"] <= 99
    assert re.fullmatch("(yes|no), [a-z]{5} 🐦", answers[1])
    assert re.fullmatch(r"[1-9][0-9]{0,3}(\+[1-9][0-9]{0,3})+", answers[2])
    shared = min(len(run.tokens[3]), len(alone.tokens[3]))
    assert run.tokens[3][:shared] == alone.tokens[3][:shared]


@pytest.mark.parametrize("constraint", [schema(PERSON), SUM])
def test_a_resumed_answer_goes_on_as_it_would_have(model: Path, constraint: Constraint) -> None:
    """Whoever takes it over is told the tokens so far, also in the middle of a word."""
    whole, resumed = Run(model), Run(model)
    whole.begin(0, Sampling(seed=5, constraint=constraint))
    whole.finish()
    assert len(whole.tokens[0]) > 4
    for count in (1, 4, len(whole.tokens[0])):
        resumed.ended.clear()
        resumed.begin(0, Sampling(seed=5, constraint=constraint), whole.tokens[0][:count])
        resumed.finish()
        assert resumed.tokens == whole.tokens


def test_what_is_not_compiled_yet_holds_up_nobody(model: Path, tokenizer: TextTokenizer) -> None:
    """The other's token comes; the same place is asked for again until the constraint is there."""
    release = threading.Event()
    deep_thread().submit(lambda: release.wait(5))
    run = Run(model)
    run.begin(0, Sampling(constraint=regex("a{3}")))
    run.begin(1, Sampling(logit_bias={STOP: -100}))
    assert run.step([0, 1])[0].is_late
    assert run.step([0, 1])[0].is_late
    assert [len(run.tokens[slot]) for slot in (0, 1)] == [0, 2]
    release.set()
    run.finish(50)
    assert tokenizer.decode(run.tokens[0]) == "aaa"


def test_one_that_was_left_is_not_compiled(model: Path) -> None:
    release = threading.Event()
    deep_thread().submit(lambda: release.wait(5))
    run = Run(model)
    run.begin(0, Sampling(constraint=regex("b{3}")))
    run.step([0])
    guide = run.sampler._slots[0].guide
    run.sampler.sample(StepPlan(2, (), (), released=(0,)), np.empty((0, VOCABULARY), np.float32))
    release.set()
    assert guide
    assert guide._compiling.cancelled()


def test_one_that_fails_fails_alone(model: Path, tmp_path: Path) -> None:
    """What a check elsewhere let pass, or a tokenizer that can't be read, ends its own request with a sentence."""
    run, blind = Run(model), Run(tmp_path / "gone.gguf")
    run.begin(0, Sampling(constraint=regex("(")))
    run.begin(1, Sampling(constraint=regex("c+"), logit_bias={STOP: -100}))
    run.begin(2, Sampling(constraint=regex("d")), generated=[5, 6])
    blind.begin(0, Sampling(constraint=regex("a")))
    deep_thread().submit(lambda: None).result()
    remarks = run.step([0, 1, 2])
    assert remarks[0] == Remark("The field 'pattern' can't be followed: unclosed group.", 400)
    assert "what was answered so far does not fit" in remarks[2].failure
    assert len(run.tokens[1]) == 1
    failed = blind.step([0])[0]
    assert failed.status == 500
    assert "tokenizer of the model can't be read" in failed.failure


@pytest.mark.parametrize(
    ("constraint", "part"),
    [
        (schema({"type": "array", "uniqueItems": True}), '"uniqueItems"'),
        (schema({**PERSON, "required": ["name", "gone"]}), "'gone' is unsatisfiable"),
        (schema({"type": "string", "minLength": 5, "maxLength": 2}), "minLength (5)"),
        (schema({"type": "string", "const": 5}), "nsatisfiable"),
        (schema({"$ref": "#/$defs/gone"}), "/$defs/gone"),
        (schema({"$ref": "#"}), "nothing satisfies it"),
        (schema({"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}), "itself again"),
        (schema({"oneOf": [{"type": "null"}, {"$ref": "#/$defs/a"}], "$defs": {"a": {}}}), "write anyOf instead"),
        (schema({"type": "string", "pattern": "(?=a)b"}), "look-around"),
        (schema({"type": "string", "pattern": "a" * 9000}), "a string in it has more than 8192 characters"),
        (schema({"enum": ["word"] * 10_000}), "32768 are the most"),
        (schema(json.loads('{"items":' * 200 + "{}" + "}" * 200)), "recursion limit"),
        (regex("a{5,2}"), "repetition count range"),
        (DOUBLING, "too costly"),
        (regex("[^\\x00-\\x{10FFFF}]"), "nothing satisfies it"),
        (regex("(" * 4000 + ")" * 4000), "nest"),
        (grammar("start: word"), '"word"'),
        (grammar("start: <|im_end|>"), "it names the control token <|im_end|>, and a grammar is of text alone"),
        (grammar("start: <end>"), "it names the control token <end>"),
        (grammar("start: <[7-700]>"), "it names tokens by their numbers, up to 700"),
        (grammar(""), "Empty grammar"),
    ],
)
def test_what_nobody_could_follow_is_refused(constraint: Constraint, part: str) -> None:
    with pytest.raises(ConstraintError) as caught:
        deep_thread().submit(lambda: check(constraint)).result(60)
    assert str(caught.value).startswith(f"The field '{constraint.field}' can't be followed: ")
    assert part in str(caught.value)


def names(count: int) -> list[str]:
    letters = "abcdefghijklmnopqrstuvwxyz"
    return [letters[place // 676] + letters[place // 26 % 26] + letters[place % 26] for place in range(count)]


@pytest.mark.parametrize("kind", [ConstraintKind.JSON_SCHEMA, ConstraintKind.GRAMMAR])
def test_the_longest_chain_overflows_no_stack(kind: ConstraintKind) -> None:
    """Each level refers to the next. On a usual stack, 2,000 of them end the process."""
    links = list(zip(names(3000), names(3001)[1:], strict=True))
    if kind is ConstraintKind.GRAMMAR:
        lines = [f"_{name}:_{following}\n" for name, following in links[:740]]
        text = "start:_aaa\n" + "".join(lines) + f"_{links[740][0]}:/a/\n"
    else:
        levels = [f'"{name}":{{"$ref":"#/$defs/{following}"}}' for name, following in links[:1100]]
        text = '{"$ref":"#/$defs/aaa","$defs":{' + ",".join([*levels, f'"{links[1100][0]}":{{}}' + "}}"])
    assert CHARACTERS_MAX[kind] * 0.9 < len(text) <= CHARACTERS_MAX[kind]
    deep_thread().submit(lambda: check(Constraint(kind, text, "x"))).result(60)


# ---- through runner processes ----


@pytest.fixture(params=[1, 3])
def client(request: pytest.FixtureRequest, model: Path) -> Iterator[Client]:
    options = {"vocabulary_size": str(VOCABULARY)}
    with pipeline(request.param, model_path=str(model), engine_options=options) as (_, port), Client(port) as opened:
        yield opened


def asked(name: str, constraint: Constraint | None, begun: Sequence[int] = ()) -> Admit:
    sampling = Sampling(seed=7, constraint=constraint, top_logprobs=2)
    prompt = (1, 2, 3)
    return make_admit(name, [*prompt, *begun], 60, prompt_length=len(prompt), sampling=sampling, stop_token_ids=(STOP,))


def test_answers_of_one_stage_or_three(client: Client, tokenizer: TextTokenizer) -> None:
    """Held to constraints and free ones at once; one whose constraint fails is told, and the others go on."""
    admits = [asked("schema", schema(PERSON)), asked("sum", SUM), asked("bad", regex("(")), asked("free", None)]
    client.send(*admits)
    events = client.events_of_all([admit.request_id for admit in admits])
    for name in ("schema", "sum"):
        end = events[name][-1]
        assert isinstance(end, Ended)
        assert end.reason is FinishReason.STOP
    assert set(json.loads(tokenizer.decode(sampled(events["schema"])))) == {"name", "age"}
    assert isinstance(events["bad"][-1], Broken)
    assert events["bad"][-1].status == 400
    assert isinstance(events["free"][-1], Ended)

    begun = sampled(events["schema"])[:5]
    client.send(asked("schema", schema(PERSON), begun))
    assert sampled(client.events_of_all(["schema"])["schema"]) == sampled(events["schema"])[5:]
