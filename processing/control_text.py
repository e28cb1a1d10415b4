# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Encode a user's control strings as text, not as control tokens.

A chat template joins the users' texts and the format's markers to one string, in which a tokenizer
cannot distinguish a user's `<|end|>` from the template's. If the values of a chat hold such a
string:

- Each of its characters is replaced by a stand-in, a private-use character that the chat does not
  hold. The template is rendered, and every control string in the result is the template's.
- Then stand-ins become the characters again, and each control string of the template becomes its
  alias, as many private-use characters. Offsets stay the same.
- That text is tokenized once, by a copy of the tokenizer in which each control token is named by
  its alias. So the same normalizer, pre-tokenizer, model and rules for spaces apply to the text
  around control tokens, and no user can write the name of a control token.
"""

import copy
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, is_dataclass
from functools import cached_property, partial
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from transformers import BatchEncoding, PreTrainedTokenizerBase, ProcessorMixin

from .text_checks import require_characters

Value = TypeVar("Value")
CHAT_MARKERS = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
TILE_MARKER = re.compile(r"<row_\d+_col_\d+>")
IMAGE_KEYS = ("image", "image_url", "url", "path", "base64")
"""Keys under which an image part holds its picture, which is no text."""
STAND_INS = range(0xF1000, 0xFFFFE)  # not transformers' own marks, U+F0000 and U+F0001
ALIASES, FILLER = range(0x100000, 0x10FFFD), "\U0010fffd"


class ControlStrings:
    """The control strings of a tokenizer: the names of its special tokens and of `markers`."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, markers: Iterable[str]) -> None:
        """Read the added tokens; a token of white space only is no control token."""
        added = tokenizer.added_tokens_decoder
        named = {*markers, *(getattr(tokenizer, "chat_control_tokens", None) or ())}
        control = {
            token.content: token_id
            for token_id, token in added.items()
            if (token.special or token.content in named or TILE_MARKER.fullmatch(token.content))
            and not token.content.isspace()
        }
        self.ids = control
        prefixes = {name[:n] for name in control for n in range(1, len(name))}
        self.found_or_begun = _whole_or_begun(control, prefixes)
        signs = {sign for name in control for sign in name if not sign.isalnum()} - set(" _-.")
        self.signs = re.compile(f"[{re.escape(''.join(sorted(signs)))}]" if signs else "(?!)")
        # each begins with a character of its own: no two can overlap
        first = zip(control, ALIASES, strict=False)
        self.aliases = {name: chr(code) + FILLER * (len(name) - 1) for name, code in first}
        self._tokenizer: Any = tokenizer.backend_tokenizer if tokenizer.is_fast else None
        self.normalizer = normalizer = getattr(self._tokenizer, "normalizer", None)
        if normalizer is not None:
            normalize = normalizer.normalize_str
            self.names_stay = all(normalize(name) == name for name in control)
            whole = {*control, *map(normalize, control)}
            self.normalized = _whole_or_begun(whole, {*prefixes, *map(normalize, prefixes)})

    def marked(self, text: str, key: str | None, stand_ins: Mapping[int, str]) -> str:
        """Put stand-ins for all that is, begins or could become part of a control string."""
        if self._needs_all(text, key):
            return "".join(sign if sign.isspace() else stand_ins[ord(sign)] for sign in text)
        return self.found_or_begun.sub(lambda found: found[0].translate(stand_ins), text)

    def holds(self, text: str, key: str | None) -> bool:
        """Return whether a string of a chat, under `key` of a message, needs stand-ins."""
        # joined to what comes after it, a beginning could become a whole control string
        return self.found_or_begun.search(text) is not None or self._needs_all(text, key)

    def _needs_all(self, text: str, key: str | None) -> bool:
        """Return whether single control strings cannot be located in a text.

        A template may write the signs around a role or a name, and a normalizer may make a control
        string of another one.
        """
        if key in ("role", "name") and self.signs.search(text):
            return True
        if self.normalizer is None:
            return False
        normalized = self.normalizer.normalize_str(text)
        if normalized == text and self.names_stay:
            return False
        return self.normalized.search(normalized) is not None

    @cached_property
    def renamed(self) -> Any:
        """The backend tokenizer with aliases as names; `ValueError` if ids would change."""
        state = json.loads(self._tokenizer.to_str())
        normalizer, model = self._tokenizer.normalizer, state["model"]
        for token in state["added_tokens"]:
            alias = self.aliases.get(token["content"])
            if alias is not None:
                token["content"] = alias
                if normalizer is not None and alias not in normalizer.normalize_str(alias):
                    token["normalized"] = False
        renamed = self.aliases.get
        if isinstance(model["vocab"], dict):
            model["vocab"] = {renamed(name, name): i for name, i in model["vocab"].items()}
        else:  # Unigram
            model["vocab"] = [[renamed(name, name), score] for name, score in model["vocab"]]
        if model.get("unk_token") is not None:
            model["unk_token"] = renamed(model["unk_token"], model["unk_token"])
        if "merges" in model:
            pairs = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
            # No merge may take or make a control token.
            model["merges"] = [
                merge
                for merge, pair in zip(model["merges"], pairs, strict=True)
                if self.ids.keys().isdisjoint((*pair, "".join(pair)))
            ]
        backend = type(self._tokenizer).from_str(json.dumps(state))
        for token_id, token in self._tokenizer.get_added_tokens_decoder().items():
            name = token.content
            if backend.token_to_id(renamed(name, name)) != token_id:
                raise ValueError(
                    f"The chat holds control strings as text, but a copy of the tokenizer gives "
                    f"{name!r} another id than {token_id}; its vocabulary has gaps."
                )
        return backend


class GuardedTokenizer:
    """A tokenizer for one chat, `mark`ed before it is rendered; otherwise like `tokenizer`.

    Texts and offsets are those of the rendered chat with stand-ins, ids those of the real text.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, control: ControlStrings, characters: set[str]
    ) -> None:
        """Choose stand-ins that are not among the `characters` of the chat and the template."""
        if not tokenizer.is_fast:
            raise ValueError(
                "The chat holds control strings as text, such as an image token; a tokenizer of "
                f"the class {type(tokenizer).__name__} cannot distinguish them from those of the "
                "template. Use a fast tokenizer, or leave them out."
            )
        self._tokenizer, self._control = tokenizer, control
        free = (chr(code) for code in STAND_INS if chr(code) not in characters)
        self._stand_ins = dict(zip(map(ord, sorted(characters)), free, strict=False))
        if len(self._stand_ins) < len(characters):
            raise ValueError(f"The chat holds {len(characters)} distinct characters, too many.")
        self._signs = {ord(stand_in): chr(sign) for sign, stand_in in self._stand_ins.items()}

    def mark(self, value: Value) -> Value:
        """Put stand-ins into the strings of a chat's value."""
        change = partial(self._control.marked, stand_ins=self._stand_ins)
        return _each_string(value, change)

    def unmark(self, text: str) -> str:
        """Replace the stand-ins of a text by their characters."""
        return text.translate(self._signs)

    def apply_chat_template(self, *args: object, **kwargs: object) -> Any:
        """Render marked messages as the tokenizer does."""
        return type(self._tokenizer).apply_chat_template(self, *args, **kwargs)

    def __call__(self, text: str | Iterable[str], **kwargs: object) -> BatchEncoding:
        """Tokenize a text or texts rendered from marked values.

        Raise `ValueError` if the control tokens would not be those that the template wrote.
        """
        texts = [text] if isinstance(text, str) else list(text)
        if kwargs.get("split_special_tokens", self._tokenizer.split_special_tokens):
            plain = [self.unmark(each) for each in texts]
            return self._tokenizer(plain[0] if isinstance(text, str) else plain, **kwargs)
        renamed = self._renamed()
        options = {"add_special_tokens": False, "verbose": False}
        wanted = self._tokenizer(texts, **options)
        written = list(map(self._written, texts, wanted.encodings))
        got = renamed(written, **options)
        if self._control_ids(wanted) != self._control_ids(got):
            raise ValueError(
                "The chat holds control strings as text, and private-use characters "
                f"(U+{ALIASES[0]:X} and above) that this tokenizer needs to tell them from those "
                "of the chat template; leave one of the two out."
            )
        return renamed(written[0] if isinstance(text, str) else written, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """Return the tokenizer's own attribute."""
        return getattr(self._tokenizer, name)

    def _renamed(self) -> PreTrainedTokenizerBase:
        """Copy the tokenizer, with aliases as names of the control tokens."""
        tokenizer = copy.copy(self._tokenizer)
        tokenizer._tokenizer = self._control.renamed
        aliases, named = self._control.aliases, tokenizer._special_tokens_map
        tokenizer._special_tokens_map = {
            key: aliases.get(str(token), token) for key, token in named.items()
        }
        return tokenizer

    def _written(self, text: str, encoding: Any) -> str:
        """Turn a rendered text into one for `_renamed`: aliases for control strings, no stand-ins.

        `encoding` is the tokenizer's: a control string of the template that it takes for text stays
        text.
        """
        names = {token_id: name for name, token_id in self._control.ids.items()}
        pieces, end = [], 0
        for token_id, (first, last) in zip(encoding.ids, encoding.offsets, strict=True):
            name = names.get(token_id, "")
            start = text.find(name, max(first, end), last)
            if name and start >= 0:
                pieces += [text[end:start], self._control.aliases[name]]
                end = start + len(name)
        return self.unmark("".join((*pieces, text[end:])))

    def _control_ids(self, output: BatchEncoding) -> list[list[int]]:
        ids = {*self._control.ids.values()} - {self._tokenizer.unk_token_id}
        return [[token for token in row if token in ids] for row in output["input_ids"]]


def guarded_tokenizer(
    tokenizer: PreTrainedTokenizerBase, values: object, template: str, markers: tuple[str, ...]
) -> GuardedTokenizer | None:
    """Make the tokenizer for a chat whose values hold control strings; None if they hold none.

    `values` are all that a caller gives the template: messages, tools, documents, variables.
    `markers` are added tokens that are control strings, as the special ones are. Raise `ValueError`
    for a tokenizer that is no fast one.
    """
    control = _control_strings(tokenizer, markers)
    strings: list[tuple[str, str | None]] = []

    def look(text: str, key: str | None) -> str:
        require_characters(text, "the chat")
        strings.append((text, key))
        return text

    _each_string(values, look)
    if not any(control.holds(text, key) for text, key in strings):
        return None
    characters = set(template).union(*(text for text, _ in strings))
    return GuardedTokenizer(tokenizer, control, characters)


def chat_markers(processor: ProcessorMixin) -> tuple[str, ...]:
    """Return the markers of our chat template and of a `VLMoEProcessor`'s images."""
    around = processor.image_start_token, processor.image_end_token, processor.global_image_token
    return (*CHAT_MARKERS, processor.image_token, *around)


def _control_strings(
    tokenizer: PreTrainedTokenizerBase, markers: tuple[str, ...]
) -> ControlStrings:
    """Return those of a tokenizer, remembered until tokens are added to it."""
    key = (markers, len(tokenizer), tokenizer.all_special_tokens)
    known = _KNOWN.get(tokenizer)
    if known is None or known[0] != key:
        known = _KNOWN[tokenizer] = (key, ControlStrings(tokenizer, markers))
    return known[1]


_KNOWN: WeakKeyDictionary[PreTrainedTokenizerBase, Any] = WeakKeyDictionary()  # key and strings


def _each_string(
    value: Any, change: Callable[[str, str | None], str], key: str | None = None
) -> Any:
    """Change the strings of a value, also inside lists, mappings and objects.

    `change` gets a string and its key. Pictures of image parts are left unchanged.
    """
    if isinstance(value, str):
        return change(value, key)
    if isinstance(value, Mapping):
        left = IMAGE_KEYS if value.get("type") in ("image", "image_url") else ()
        return {
            _each_string(name, change): item if name in left else _each_string(item, change, name)
            for name, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [_each_string(item, change, key) for item in value]
    if is_dataclass(value) and not isinstance(value, type):
        return _each_string({f.name: getattr(value, f.name) for f in fields(value)}, change)
    if callable(getattr(value, "model_dump", None)):  # pydantic
        return _each_string(value.model_dump(), change)
    return value


def _whole_or_begun(names: Iterable[str], beginnings: Iterable[str]) -> re.Pattern[str]:
    """Compile a pattern of any of the names, and of any beginning at the end of a text."""
    return re.compile(rf"{_any_of(names)}|(?:{_any_of(beginnings)})\Z")


def _any_of(strings: Iterable[str]) -> str:
    """Return a pattern of any of the strings, the longest first, as tokenizers match them."""
    longest_first = sorted(filter(None, strings), key=lambda string: (-len(string), string))
    return "|".join(map(re.escape, longest_first)) or "(?!)"
