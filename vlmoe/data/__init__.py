# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Rows in the wild become conversations, encoded examples and batches.

The modules in the order of the way of the data: `loading` reads a source (`local_files`, the Hub,
`easy_vqa`), `row_formats` knows the forms of rows, `rows` takes them from Python, `conversations`
checks them, `encoding` makes tokens and tiles, `collator` batches.
"""
