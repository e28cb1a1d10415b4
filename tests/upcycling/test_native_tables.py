"""The tables of native pairs in the documentation are those of the code."""

import importlib.util
from pathlib import Path

from vlmoe.upcycling.native_pairs import CONTAINERS, REFUSED, TEXT_PAIRS, WHOLE_PAIRS

DOCS = Path(__file__).parents[2] / "docs"


def test_the_page_holds_the_tables_of_today() -> None:
    spec = importlib.util.spec_from_file_location("native_tables", DOCS / "native_tables.py")
    assert spec is not None and spec.loader is not None
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    page = tables.PAGE.read_text(encoding="utf-8")
    assert page == tables.updated(page), "run: python docs/native_tables.py"
    for kind in (*TEXT_PAIRS, *WHOLE_PAIRS, *CONTAINERS, *REFUSED):
        assert f"`{kind}`" in page
    emptied = tables.BLOCK.sub(lambda block: block[1] + block[3], page)
    assert tables.updated(emptied) == page != emptied
