# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""The default chat format: a marker, the content and `<|end|>` for each turn, no line breaks.

The assistant's content and its `<|end|>` stand between `generation` markers: the tokens to learn.
"""

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
