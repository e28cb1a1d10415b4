# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Chat templates of language models, made to take image parts."""

import re

from ..processing.chat_template import JOIN_PARTS

_IMAGE_PART = re.compile(r"""['"]image['"]""")
_FLATTEN_CONTENT = (
    """\
{%- macro flat_content(content) -%}
"""
    + JOIN_PARTS
    + """\
{%- endmacro -%}
{%- set flat = namespace(messages=[]) -%}
{%- for message in messages -%}
    {%- if message.content is not string and message.content is iterable -%}
        {%- set message = dict(message, content=flat_content(message.content)) -%}
    {%- endif -%}
    {%- set flat.messages = flat.messages + [message] -%}
{%- endfor -%}
{%- set messages = flat.messages %}
"""
)  # the last line break, which is trimmed, lets a template begin its own line


def with_image_parts(template: str, image_token: str = "<image>") -> str:
    """Make a language model's chat template take lists of image and text parts as content, too.

    The parts are joined to one string, an image being its token, before the template sees them, so
    strings render as before. A template that names image parts itself is returned unchanged.
    """
    if _IMAGE_PART.search(template):
        return template
    return _FLATTEN_CONTENT.replace("<image>", image_token) + template
