"""Reading what a model card says: its tables, code and the files that it is rendered from."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from vlmoe.hub.model_card import CARD_FILE

CARDS = Path(__file__).parents[2] / "model_cards"
COMMITTED = sorted(path.parent for path in CARDS.glob(f"*/{CARD_FILE}"))


def read(file: Path) -> Any:
    return json.loads(file.read_text())


def change(file: Path, edit: Callable[[Any], Any]) -> None:
    """Apply `edit` to the content of a JSON file."""
    content = read(file)
    edit(content)
    file.write_text(json.dumps(content))


def tables(text: str) -> dict[str, list[dict[str, list[str]]]]:
    """Heading -> its tables, each {first cell: other cells}; every row as wide as its header."""
    found: dict[str, list[dict[str, list[str]]]] = {}
    heading, width = "", 0
    for line in re.sub(r"```.*?```", "", text, flags=re.S).splitlines():
        if line.startswith("#"):
            heading = line.lstrip("# ")
        if not line.startswith("|"):
            width = 0
            continue
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if not width:
            width = len(cells)
            found.setdefault(heading, []).append({})
        assert len(cells) == width, line
        found[heading][-1][cells[0]] = cells[1:]
    return found


def snippets(text: str) -> Iterator[str]:
    yield from re.findall(r"^```python\n(.*?)^```$", text, flags=re.S | re.M)


def prose(text: str) -> str:
    """The card without its code."""
    return re.sub(r"^```python\n.*?^```$", "", text, flags=re.S | re.M)
