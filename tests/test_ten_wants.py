"""Ten things a newcomer wants, each in at most eight lines of user code.

A function marked `@want` is the user's code, imports included, as it would stand in a script; the
test below it runs the code and judges the result.
"""

import ast
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import picture, user
from hub_server import HubServer
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel

from vlmoe import VLMoEForConditionalGeneration, VLMoEProcessor

MOST_LINES = 8
WANTS = 10
Folder = Path
Rows = list[dict[str, Any]]


def want(code: Callable[..., Any]) -> Callable[..., Any]:
    """Mark the code of a user."""
    return code


@pytest.fixture(autouse=True)
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saved_model: Path) -> Rows:
    """Four questions about two pictures in the current folder, which holds a saved model, too."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CI", "1")
    shutil.copytree(saved_model, tmp_path / "model")
    for seed, name in enumerate(("red.png", "blue.png")):
        picture(seed).save(tmp_path / name)
    return [
        {"image": f"{color}.png", "question": question, "answer": answer}
        for color in ("red", "blue")
        for question, answer in (("what color is the shape?", color), ("is it red?", "yes"))
    ]


def generated(model: PreTrainedModel, processor: Any, image: str, question: str) -> str:
    """The answer by the library's own means."""
    inputs = processor.apply_chat_template(
        [user(question, [image])],
        tokenize=True,
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
    )
    model.eval()
    tokens = model.generate(**inputs, max_new_tokens=64, do_sample=False)
    text = processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return text.strip()


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


@want
def train_and_ask(rows: Rows) -> tuple[Any, str]:
    import vlmoe

    trainer = vlmoe.VLMoETrainer("tiny", {"max_steps": 2}, train_dataset=rows)
    trainer.train()
    answer = vlmoe.answer(trainer.model, trainer.processing_class, "red.png", "what color is it?")
    return trainer, answer


def test_train_on_pictures_questions_and_answers_then_ask(rows: Rows) -> None:
    trainer, answer = train_and_ask(rows)
    assert trainer.state.global_step == 2
    expected = generated(trainer.model, trainer.processing_class, "red.png", "what color is it?")
    assert answer.strip() == expected


@want
def fine_tune_by_plain_trainer(rows: Rows) -> Any:
    from transformers import Trainer, TrainingArguments

    from vlmoe import VLMoECollator, VLMoEForConditionalGeneration, VLMoEProcessor

    model = VLMoEForConditionalGeneration.from_pretrained("model")
    collator = VLMoECollator(VLMoEProcessor.from_pretrained("model"))
    arguments = TrainingArguments("tuned", max_steps=2, remove_unused_columns=False)
    trainer = Trainer(model, arguments, collator, rows)
    trainer.train()
    return trainer


def test_fine_tune_a_saved_model_by_plain_trainer(rows: Rows) -> None:
    before = weights(VLMoEForConditionalGeneration.from_pretrained("model"))
    trainer = fine_tune_by_plain_trainer(rows)
    assert trainer.state.log_history[-1]["train_loss"] > 0
    assert any(not value.equal(before[name]) for name, value in weights(trainer.model).items())


@want
def ask_a_picture() -> str:
    from vlmoe import VLMoEForConditionalGeneration, VLMoEProcessor, answer

    model = VLMoEForConditionalGeneration.from_pretrained("model")
    processor = VLMoEProcessor.from_pretrained("model")
    return answer(model, processor, "red.png", "what color is the shape?")


def test_ask_a_picture() -> None:
    model = AutoModelForImageTextToText.from_pretrained("model")
    processor = AutoProcessor.from_pretrained("model")
    expected = generated(model, processor, "red.png", "what color is the shape?")
    assert ask_a_picture().strip() == expected


@want
def adapt_the_experts(rows: Rows) -> Any:
    import vlmoe

    model = vlmoe.VLMoEForConditionalGeneration.from_pretrained("model")
    processor = vlmoe.VLMoEProcessor.from_pretrained("model")
    adapted = vlmoe.add_expert_lora(model, r=4)
    options = {"train_dataset": rows, "processing_class": processor}
    vlmoe.VLMoETrainer(adapted, {"max_steps": 2}, **options).train()
    return adapted


def test_lora_on_the_experts(rows: Rows) -> None:
    before = weights(VLMoEForConditionalGeneration.from_pretrained("model"))
    adapted = adapt_the_experts(rows)
    trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    assert trained and all("experts" in name and "lora_" in name for name in trained)
    assert any(p.abs().sum() > 0 for name, p in trained.items() if "lora_B" in name)
    after = weights(adapted.unload())
    assert all(value.equal(before[name]) for name, value in after.items())


@want
def balance_by_bias(rows: Rows) -> Any:
    import vlmoe

    overrides = {"text_config": {"router_bias_update_rate": 0.01}}
    options = {"train_dataset": rows, "model_overrides": overrides}
    trainer = vlmoe.VLMoETrainer("model", {"max_steps": 2}, **options)
    trainer.train()
    return trainer.model


def test_bias_balancing_needs_no_callback(rows: Rows) -> None:
    model = balance_by_bias(rows)
    biases = [b for name, b in model.named_buffers() if name.endswith("correction_bias")]
    assert len(biases) == 3 and all(bias.abs().sum() > 0 for bias in biases)


@want
def see_routing(model: Any, batch: Any) -> Any:
    import vlmoe

    with vlmoe.record_routing(model) as trace:
        model(**batch)
    return trace.sequences()


def test_see_the_routing_of_a_batch(rows: Rows) -> None:
    from vlmoe import VLMoECollator

    model = VLMoEForConditionalGeneration.from_pretrained("model")
    batch = VLMoECollator(VLMoEProcessor.from_pretrained("model"))(rows)
    sequences = see_routing(model, batch)
    assert len(sequences) == len(rows)
    logits = model(**batch, output_router_logits=True).router_logits
    real = batch["attention_mask"].bool()
    for layer, layer_logits in enumerate(logits):
        expected = layer_logits.view(*real.shape, -1).topk(2).indices.sort(-1).values
        for row, sequence in enumerate(sequences):
            chosen = torch.as_tensor(sequence.experts[layer]).sort(-1).values
            assert chosen.equal(expected[row][real[row]])


@want
def write_the_page(rows: Rows) -> None:
    import vlmoe

    model = vlmoe.VLMoEForConditionalGeneration.from_pretrained("model")
    processor = vlmoe.VLMoEProcessor.from_pretrained("model")
    vlmoe.inspect_routing(model, processor, rows).save("routing")


def test_the_page_of_routing_from_python(rows: Rows) -> None:
    write_the_page(rows)
    (page,) = Path("routing").glob("*.html")
    assert "what color is the shape?" in page.read_text()


@want
def measure(rows: Rows) -> Any:
    import vlmoe

    model = vlmoe.VLMoEForConditionalGeneration.from_pretrained("model")
    processor = vlmoe.VLMoEProcessor.from_pretrained("model")
    return vlmoe.evaluate(model, processor, rows)


def test_evaluate(rows: Rows) -> None:
    from vlmoe import answer

    model = VLMoEForConditionalGeneration.from_pretrained("model")
    processor = VLMoEProcessor.from_pretrained("model")
    asked = rows[0]["image"], rows[0]["question"]
    rows[0]["answer"] = answer(model, processor, *asked, max_new_tokens=32)
    assert measure(rows).exact_match == 1 / len(rows)


@want
def make_it_sparse() -> Any:
    import vlmoe

    vlmoe.upcycle("dense", "sparse", num_experts=4)
    return vlmoe.VLMoEForConditionalGeneration.from_pretrained("sparse")


def test_upcycle(tiny_model: Callable[..., PreTrainedModel]) -> None:
    from vlmoe import VLMoECollator

    processor = VLMoEProcessor.from_pretrained("model")
    text = {"mlp_only_layers": [0, 1, 2], "vocab_size": len(processor.tokenizer)}
    dense = tiny_model(text=text)
    dense.save_pretrained("dense")
    processor.save_pretrained("dense")
    sparse = make_it_sparse()
    batch = VLMoECollator(processor)([{"image": "red.png", "question": "red?", "answer": "yes"}])
    assert all(layer.mlp.experts.num_experts == 4 for layer in sparse.model.language_model.layers)
    torch.testing.assert_close(sparse(**batch).logits, dense(**batch).logits, rtol=0, atol=1e-4)


@want
def share() -> str:
    import vlmoe

    result = vlmoe.push("model", "tester/model", private=True)
    return result.url


def test_push_with_a_card(hub: HubServer, hub_process: Callable[..., Any]) -> None:
    hub_process(in_folder, Path.cwd())
    hub_process(share)
    assert {"README.md", "model.safetensors", "config.json"} <= hub.files("tester/model")


def in_folder(folder: Path) -> None:
    import os

    os.chdir(folder)


def test_each_want_takes_at_most_eight_lines() -> None:
    functions = [f for f in ast.parse(Path(__file__).read_text()).body if hasattr(f, "body")]
    wants = [f for f in functions if [*map(ast.unparse, f.decorator_list)] == ["want"]]
    assert len(wants) == WANTS
    lengths = {f.name: sum(s.end_lineno - s.lineno + 1 for s in f.body) for f in wants}
    assert max(lengths.values()) <= MOST_LINES, lengths
