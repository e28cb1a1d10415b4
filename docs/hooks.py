# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Fill in the parts of the docs that the code knows best, while mkdocs builds the site.

- `{{ help COMMAND }}`: the output of `vlmoe COMMAND --help`;
- `{{ fields CLASS }}`: a table of the fields of a configuration class and their defaults;
- `../../benchmarks/results/FIGURE`: a figure that a benchmark keeps beside its numbers; pages in
  results/ link to it where a reader of the repository finds it.
"""

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mkdocs.structure.files import Files

ROOT = Path(__file__).parent.parent
FIGURES = ROOT / "benchmarks" / "results"


def on_files(files: "Files", config: Any) -> "Files":
    """Add the figures of the benchmarks to the pages about them."""
    from mkdocs.structure.files import File

    for path in FIGURES.glob("*.png"):
        files.append(File.generated(config, f"results/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace the placeholders of a page."""
    markdown = markdown.replace("](../../benchmarks/results/", "](")
    markdown = re.sub(r"\{\{ help (.*?) ?\}\}", lambda found: help_text(found[1]), markdown)
    return re.sub(r"\{\{ fields (\w+) \}\}", lambda found: field_table(found[1]), markdown)


def help_text(command: str) -> str:
    """Return what `vlmoe COMMAND --help` prints, as a block of text."""
    plain = {"COLUMNS": "100", "TERMINAL_WIDTH": "100", "NO_COLOR": "1", "TERM": "dumb"}
    shown = subprocess.run(
        [sys.executable, "-m", "vlmoe_cli.main", *command.split(), "--help"],
        env=os.environ | plain,
        capture_output=True,
        text=True,
        check=True,
    )
    return f"```text\n{shown.stdout.strip()}\n```"


def field_table(class_name: str) -> str:
    """Return a table of the fields that a configuration class defines, with their defaults."""
    import vlmoe

    config_class = getattr(vlmoe, class_name)
    own = set(config_class.__annotations__)
    lines = ["| field | default |", "|---|---|"]
    for field in dataclasses.fields(config_class):
        if field.name in own:
            factory = field.default_factory
            default = field.default if factory is dataclasses.MISSING else factory()
            lines.append(f"| `{field.name}` | `{default!r}` |")
    return "\n".join(lines)
