# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Chat templates: the default one, and those of language models made to take images.

The default format is a marker, the content and `<|end|>` for each turn, no line breaks. The
assistant's content and its `<|end|>` stand between `generation` markers: the tokens to learn.
"""

import re

DEFAULT_CHAT_TEMPLATE = """\
{%- macro render(content) -%}
    {%- if content is string -%}
        {{- content -}}
    {%- else -%}
        {%- for part in content or [] -%}
            {%- if part.type == 'image' -%}
                {{- '<image>' -}}
            {%- elif part.type == 'text' -%}
                {{- part.text -}}
            {%- else -%}
                {{- raise_exception("Content type '" ~ part.type ~ "'; allowed: image, text.") -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- for message in messages -%}
    {%- if message.role == 'assistant' -%}
        {{- '<|assistant|>' -}}
        {%- generation -%}
            {{- render(message.content) -}}{{- '<|end|>' -}}
        {%- endgeneration -%}
    {%- elif message.role == 'user' -%}
        {{- '<|user|>' -}}{{- render(message.content) -}}{{- '<|end|>' -}}
    {%- elif message.role == 'system' -%}
        {{- '<|system|>' -}}{{- render(message.content) -}}{{- '<|end|>' -}}
    {%- else -%}
        {{- raise_exception("Role '" ~ message.role ~ "'; allowed: system, user, assistant.") -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|assistant|>' -}}
{%- endif -%}
"""

_IMAGE_PART = re.compile(r"""['"]image['"]""")
_FLATTEN_CONTENT = """\
{%- macro flat_content(content) -%}
    {%- for part in content -%}
        {%- if part.type == 'image' -%}
            {{- '<image>' -}}
        {%- elif part.type == 'text' -%}
            {{- part.text -}}
        {%- else -%}
            {{- raise_exception("Content type '" ~ part.type ~ "'; allowed: image, text.") -}}
        {%- endif -%}
    {%- endfor -%}
{%- endmacro -%}
{%- set flat = namespace(messages=[]) -%}
{%- for message in messages -%}
    {%- if message.content is not string and message.content is iterable -%}
        {%- set message = dict(message, content=flat_content(message.content)) -%}
    {%- endif -%}
    {%- set flat.messages = flat.messages + [message] -%}
{%- endfor -%}
{%- set messages = flat.messages %}
"""  # the line break, which is trimmed, lets a template begin its own line


def with_image_parts(template: str, image_token: str = "<image>") -> str:
    """A language model's chat template that takes lists of image and text parts as content, too.

    The parts are joined to one string, an image being its token, before the template sees them:
    what it makes of strings stays the same. A template that names image parts itself is returned
    as it is.
    """
    if _IMAGE_PART.search(template):
        return template
    return _FLATTEN_CONTENT.replace("<image>", image_token) + template
