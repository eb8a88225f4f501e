"""From the messages of a chat to the prompt that the model was trained on, by the template that its file carries.

The variables, functions and whitespace rules are those of Hugging Face's chat templates
(https://huggingface.co/docs/transformers/chat_templating).

A message may contain the text of a control token, such as `<|im_end|>`. If it became that token, whoever wrote the
message could close his turn and speak as the system. So each such text is told apart from markup: while the template
works, its first character is replaced by a private one, which nothing else in the prompt has; afterwards it is put
back as a part that is no markup. Templates see texts of unchanged length and may trim, split and join them.
"""

import functools
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, Final, NamedTuple, NoReturn

from jinja2 import TemplateError

from covey.schema.generation import ChatMessage
from covey.text.sandbox import render_template

# For files without a template: base models, which know no roles but continue a transcript sensibly.
PLAIN_TEMPLATE: Final = (
    "{% for message in messages %}{{ message['role'] | capitalize }}: {{ message['content'] }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
REASON_CHARACTERS_MAX: Final = 300
DATE_FORMAT_CHARACTERS_MAX: Final = 100
_PRIVATE_CHARACTERS: Final = range(0xF0000, 0xFFFFE)  # Supplementary Private Use Area-A


class TemplateRefusedError(Exception):
    """The model's chat template can't render these messages; the message is one sentence for a person."""


class PromptPart(NamedTuple):
    """A piece of a prompt; the text of a control token is that token only in markup."""

    text: str
    is_markup: bool


def render(
    template: str,
    messages: Sequence[ChatMessage],
    *,
    bos: str,
    eos: str,
    add_generation_prompt: bool = True,
    now: datetime | None = None,
) -> str:
    """The prompt as one text. Without `now` the template finds no `strftime_now`. Raises `TemplateRefusedError`."""
    dated: dict[str, Any] = {"strftime_now": functools.partial(_dated, now)} if now else {}
    variables: dict[str, Any] = {
        "messages": [{"role": message.role, "content": message.content} for message in messages],
        "tools": None,
        "documents": None,
        "bos_token": bos,
        "eos_token": eos,
        "add_generation_prompt": add_generation_prompt,
        "raise_exception": _refuse,
        **dated,
    }
    return _rendered(template, variables)


def render_parts(
    template: str,
    messages: Sequence[ChatMessage],
    *,
    bos: str,
    eos: str,
    control_positions: Callable[[str], Iterable[int]],
    add_generation_prompt: bool = True,
    now: datetime | None = None,
) -> list[PromptPart]:
    """The prompt, in which what users wrote is no markup, whatever it looks like.

    `control_positions` says where in a text the texts of control tokens begin. Raises `TemplateRefusedError`.
    """
    masks = _masks(template, messages, control_positions)
    masked = [_masked(message, masks, control_positions) for message in messages]
    prompt = render(template, masked, bos=bos, eos=eos, add_generation_prompt=add_generation_prompt, now=now)
    return list(_parts(prompt, {mask: character for character, mask in masks.items()}))


def _rendered(template: str, variables: Mapping[str, Any]) -> str:
    try:
        return render_template(template, variables)
    except TemplateRefusedError:
        raise
    except TemplateError as error:
        raise _refusal(error.message or type(error).__name__) from None
    except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError) as error:
        raise _refusal(f"{type(error).__name__}: {error}") from None


def _refuse(message: object = "") -> NoReturn:
    raise _refusal(str(message))


def _refusal(reason: str) -> TemplateRefusedError:
    sentence = " ".join(reason.split())[:REASON_CHARACTERS_MAX]
    return TemplateRefusedError(f"the model's chat template refuses these messages: {sentence}")


def _dated(now: datetime, form: str) -> str:
    """Refuses widths, by which a short format makes a long text."""
    if len(form) > DATE_FORMAT_CHARACTERS_MAX or re.search(r"%[^a-zA-Z%]*\d", form):
        raise _refusal("it wants the date in a form that is refused here")
    return now.strftime(form)


def _masks(
    template: str, messages: Sequence[ChatMessage], control_positions: Callable[[str], Iterable[int]]
) -> dict[str, str]:
    """For each character that a control token in the messages begins with, one that occurs nowhere."""
    texts = [text for message in messages for text in (message.role, message.content)]
    starts = sorted({text[position] for text in texts for position in control_positions(text)})
    if not starts:
        return {}
    used = set(template).union(*texts)
    free = (chr(point) for point in _PRIVATE_CHARACTERS if chr(point) not in used)
    return dict(zip(starts, itertools.islice(free, len(starts)), strict=True))


def _masked(
    message: ChatMessage, masks: Mapping[str, str], control_positions: Callable[[str], Iterable[int]]
) -> ChatMessage:
    def masked(text: str) -> str:
        characters = list(text)
        for position in control_positions(text):
            characters[position] = masks[text[position]]
        return "".join(characters)

    return ChatMessage(masked(message.role), masked(message.content)) if masks else message


def _parts(prompt: str, unmask: Mapping[str, str]) -> Iterator[PromptPart]:
    if not unmask:
        yield PromptPart(prompt, is_markup=True)
        return
    for is_mask, characters in itertools.groupby(prompt, unmask.__contains__):
        text = "".join(characters)
        yield PromptPart("".join(unmask[mask] for mask in text) if is_mask else text, is_markup=not is_mask)
