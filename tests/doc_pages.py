"""The snippets of README and docs: how they are found, and how each kind is run.

A page is run from top to bottom: its Python blocks share one namespace, as in a notebook, and its
shell commands run between them. The current folder holds what the pages name: models, data and a
picture.
"""

import contextlib
import io
import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PAGES = ["README.md", *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PRINTED = re.compile(r"^print\(.*\)\n# (.+)$", re.MULTILINE)
SHORT = {
    "train": ["--max_steps", "2", "--use_cpu", "True"],
    "evaluate": ["--max_rows", "2"],
    "inspect": [],
}
"""Options that keep a command short; the command line takes the last of an option's values."""


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text and the line where it starts."""

    language: str
    code: str
    line: int


def blocks(page: str) -> list[Block]:
    """Return the fenced blocks of a page."""
    text = (ROOT / page).read_text()
    return [Block(m[1], m[2], text.count("\n", 0, m.start()) + 1) for m in FENCE.finditer(text)]


def commands(block: Block) -> list[str]:
    """Return the commands of a shell block, comments left out."""
    joined = block.code.replace("\\\n", " ").splitlines()
    return [shlex.join(words) for line in joined if (words := shlex.split(line, comments=True))]


def run_page(page: str, exceptions: Mapping[str, str], replaced: Mapping[str, str]) -> set[str]:
    """Run the snippets of a page in the current folder; return the exceptions that were met.

    Args:
        page: its path in the repository.
        exceptions: commands that are not run, each with its reason.
        replaced: texts to replace in every snippet.
    """
    namespace: dict[str, Any] = {"__name__": "__main__"}
    met = set()
    for block in blocks(page):
        code = block.code
        for old, new in replaced.items():
            code = code.replace(old, new)
        block = Block(block.language, code, block.line)
        try:
            if block.language == "python":
                run_python(block, namespace, page)
            elif block.language == "bash":
                met |= run_shell(block, exceptions)
            elif block.language == "yaml":
                Path("my_run.yaml").write_text(block.code)
            elif block.language == "json":
                check_row(json.loads(block.code))
            elif block.language not in ("text", "bibtex"):
                raise ValueError(f"nothing runs blocks of {block.language!r}")
        except BaseException as error:
            error.add_note(f"in the block at {page}:{block.line}")
            raise
    return met


def run_python(block: Block, namespace: dict[str, Any], page: str) -> None:
    """Run a block; a comment below a `print` is what it prints."""
    out = io.StringIO()
    # Lines of a traceback are those of the page.
    code = compile("\n" * block.line + block.code, page, "exec")
    with contextlib.redirect_stdout(out):
        exec(code, namespace)
    for expected in PRINTED.findall(block.code):
        assert expected in out.getvalue().splitlines()


def run_shell(block: Block, exceptions: Mapping[str, str]) -> set[str]:
    """Run the `vlmoe` commands of a block; of benchmarks see that they are there."""
    from vlmoe_cli.main import main

    met = set()
    for command in commands(block):
        words = shlex.split(command)
        benchmark = next((word for word in words if word.startswith("benchmarks/")), None)
        if command in exceptions:
            met.add(command)
        elif benchmark and "python" in words:
            assert (ROOT / benchmark).is_file(), f"{benchmark} is not there"
        elif words[0] == "vlmoe":
            short = [] if "--help" in words else SHORT.get(words[1], [])
            if "easy_vqa" in words:
                name = "--max_train_rows" if words[1] == "train" else "--max_rows"
                short = [*short, name, "2"]
            if "--eval_split" in words:
                short = [*short, "--max_eval_rows", "1"]
            assert main([*words[1:], *short]) == 0, command
        else:
            raise AssertionError(f"`{command}` is neither run nor listed as an exception")
    return met


def check_row(row: dict[str, Any]) -> None:
    """Load a row as a dataset and collate it as training does."""
    import vlmoe

    Path("my_data/one_row.jsonl").write_text(json.dumps(row))
    (loaded,) = vlmoe.load_rows("my_data/one_row.jsonl")
    collate = vlmoe.VLMoECollator(vlmoe.VLMoEProcessor.from_pretrained("outputs/tiny"))
    batch = collate([loaded])
    Path("my_data/one_row.jsonl").unlink()
    assert (batch["labels"] != -100).any()
    sees = any(name in json.dumps(row) for name in ("picture.png", "clip.mp4"))
    assert ("pixel_values" in batch) == sees
