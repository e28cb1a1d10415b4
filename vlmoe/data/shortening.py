# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Cut text from the questions of a conversation that is too long for the model."""

from collections.abc import Callable

from .conversations import Conversation


def shortened(
    conversation: Conversation,
    room: int,
    length: Callable[[Conversation], int],
    longest: bool = False,
) -> Conversation:
    """Shorten a conversation to `room` tokens, or as far as its questions' text allows.

    Characters are cut from the beginning of the first question, then of the next; if all questions
    are gone, of the system message. With `longest` the end of the longest text of the user is cut,
    such as a document's beside its instruction, and no other text. Images, answers and the chat
    template's text stay. The same conversation and room give the same result.

    Args:
        conversation: one that is too long; one that fits is returned as it is.
        room: the largest number of tokens.
        length: counts the tokens of a conversation.
        longest: cut the longest text, at its end.
    """
    if length(conversation) <= room:
        return conversation
    places = [
        (turn, part)
        for role in ("user", "system")
        for turn, each in enumerate(conversation)
        if each.role == role
        for part, text in enumerate(each.parts)
        if isinstance(text, str)
    ]
    if longest:
        places = [place for place in places if conversation[place[0]].role == "user"]
        places = sorted(places, key=lambda each: -len(_text(conversation, each)))[:1]
    for place in places:
        text = _text(conversation, place)
        shorter = _with_text(conversation, place, "")
        if length(shorter) > room:
            conversation = shorter
            continue
        too_long, fits = 0, len(text)  # characters cut
        while fits - too_long > 1:
            middle = (too_long + fits) // 2
            if length(_with_text(conversation, place, _cut(text, middle, longest))) <= room:
                fits = middle
            else:
                too_long = middle
        return _with_text(conversation, place, _cut(text, fits, longest))
    return conversation


def _text(conversation: Conversation, place: tuple[int, int]) -> str:
    return str(conversation[place[0]].parts[place[1]])


def _cut(text: str, characters: int, at_end: bool) -> str:
    """Cut characters off the end or the beginning of a text."""
    return text[: len(text) - characters] if at_end else text[characters:]


def _with_text(conversation: Conversation, place: tuple[int, int], text: str) -> Conversation:
    """Replace the text in one place."""
    turns = list(conversation)
    parts = list(turns[place[0]].parts)
    parts[place[1]] = text
    turns[place[0]] = turns[place[0]]._replace(parts=tuple(parts))
    return tuple(turns)
