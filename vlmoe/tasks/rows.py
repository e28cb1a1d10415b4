# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""The converters of the tasks: a row's columns and an instruction become conversations.

The images come first, then the instruction, then the text of the row. The text is a part of its
own, so that a long one can be shortened without its instruction.
"""

from collections.abc import Mapping

from transformers.models.whisper.tokenization_whisper import LANGUAGES

from ..data.row_fields import AnyRow, Messages, is_list
from ..data.row_formats import Converted, Parts, dialogue, format_of, text_parts


def captions(row: AnyRow, images: int, name: str, prompt: str) -> Converted:
    """Convert the caption of the row's images; of several captions each is a conversation.

    Raises:
        ValueError: the list of captions is empty.
    """
    (given,) = row.values()
    several = list(given) if is_list(given) else [given]
    if not several:
        raise ValueError(f"{name}: the list of captions is empty; give one, or leave the row out.")
    return [dialogue(_instruction(prompt), text_parts(each), images) for each in several], []


def classes(row: AnyRow, images: int, name: str, prompt: str) -> Converted:
    """Convert the class of the row's images, whose name is the answer.

    Raises:
        ValueError: the row has no class, or several.
    """
    (label,) = row.values()
    is_name = isinstance(label, str) and bool(label.strip())
    if not is_name and not (type(label) is int and label >= 0):
        raise ValueError(
            f"{name}: the label is {label!r:.80}; it must be the name of one class, or its number."
        )
    return [dialogue(_instruction(prompt), text_parts(label), images)], []


def questions(row: AnyRow, images: int, name: str, prompt: str) -> Converted:
    """Convert a question and its answer; an instruction follows the question."""
    form = format_of(row.keys())
    assert form is not None  # the table's columns are question and answer
    conversations, pictures = form.convert(row, images, name)
    if prompt:
        conversations[0][0]["content"] += text_parts(f"\n{prompt}") or []
    return conversations, pictures


def videos(row: AnyRow, images: int, name: str, prompt: str) -> Converted:
    """Convert a video and what is said about it; a `question` takes the place of the prompt."""
    question = row.get("question")
    (text,) = (value for column, value in row.items() if column != "question")
    asked = _instruction(prompt) if question is None else text_parts(question)
    messages = dialogue(asked, text_parts(text), images)
    messages[0]["content"] = [{"type": "video", "text": None}, *(messages[0]["content"] or [])]
    return [messages], []


def documents(row: AnyRow, images: int, name: str, prompt: str) -> Converted:
    """Convert a document and its summary: the two columns, in this order."""
    document, summary = row.values()
    return [_text_task(prompt, document, summary, images)], []


def translations(
    row: AnyRow, images: int, name: str, prompt: str, direction: tuple[str, str] | None = None
) -> Converted:
    """Convert `{"en": ..., "de": ...}`, by default from the first language to the second.

    `{source}` and `{target}` in the prompt become the languages' names.

    Raises:
        ValueError: the row has other languages, or not two.
    """
    (given,) = row.values()
    texts = {k: v for k, v in given.items() if v is not None} if isinstance(given, Mapping) else {}
    languages = direction or tuple(texts)
    if len(languages) != 2 or not all(language in texts for language in languages):
        wanted = " and ".join(direction) if direction else "two languages, such as en and de"
        raise ValueError(
            f"{name}: `translation` must hold texts of {wanted}; it holds "
            f"{', '.join(map(str, texts)) or repr(given)[:80]}."
        )
    source, target = languages
    prompt = prompt.replace("{source}", _language(source)).replace("{target}", _language(target))
    return [_text_task(prompt, texts[source], texts[target], images)], []


def _text_task(prompt: str, text: object, answer: object, images: int) -> Messages:
    """Return a user turn of the instruction and the text, two parts, and the answer."""
    asked = text_parts(text)
    if prompt and asked is not None:
        asked = [*(text_parts(f"{prompt}\n") or []), *asked]
    return dialogue(asked, text_parts(answer), images)


def _instruction(prompt: str) -> Parts:
    return text_parts(prompt) or [] if prompt else []


def _language(code: str) -> str:
    """Return the English name of a language, or its code where that is not known."""
    return LANGUAGES[code].title() if code in LANGUAGES else code
