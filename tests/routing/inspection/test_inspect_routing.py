"""`inspect_routing`: the function behind `vlmoe inspect`, on plain rows and model objects."""

from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

import vlmoe
from vlmoe import VLMoEForConditionalGeneration, VLMoEProcessor


def test_plain_rows_and_an_earlier_state_give_a_page_and_a_table(
    model_folder: Path,
    processor: VLMoEProcessor,
    make_image: Callable[..., Image.Image],
    tmp_path: Path,
) -> None:
    model = VLMoEForConditionalGeneration.from_pretrained(model_folder).train()
    rows = [{"image": make_image(), "question": "what color?", "answer": "red"}] * 3
    found = vlmoe.inspect_routing(
        model, processor, rows, max_rows=2, max_new_tokens=2, before=model, dataset_name="mine"
    )
    assert model.training, "the mode is that of before"
    assert found.dataset == "mine, 2 rows" and len(found.prompts) == 2
    assert found.routing is not None and len(found.routing.question_types) == 2
    assert found.before is not None and found.before.change is not None
    assert found.before.change["all"]["changed"] == [0.0] * len(found.layers)
    page = found.save(tmp_path / "out")
    assert (
        page == tmp_path / "out" / "inspection.html" and str(model_folder) not in page.read_text()
    )
    assert (tmp_path / "out" / "inspection.json").exists()
    assert found.table().splitlines()[0].split()[0] == "layer"


def test_a_question_alone_has_prompts_and_no_table(
    model_folder: Path, processor: VLMoEProcessor
) -> None:
    model = VLMoEForConditionalGeneration.from_pretrained(model_folder)
    found = vlmoe.inspect_routing(model, processor, question="is it red?", max_new_tokens=2)
    assert found.table() == "" and [prompt.question for prompt in found.prompts] == ["is it red?"]


def test_arguments_that_do_not_go_together_are_refused(processor: VLMoEProcessor) -> None:
    model = VLMoEForConditionalGeneration
    with pytest.raises(ValueError, match="Nothing to inspect"):
        vlmoe.inspect_routing(model, processor)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="goes with a question"):
        vlmoe.inspect_routing(model, processor, [], images="x.png")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no rows to inspect"):
        vlmoe.inspect_routing(model, processor, [])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="max_rows must be at least 1"):
        vlmoe.inspect_routing(model, processor, [], max_rows=0)  # type: ignore[arg-type]
