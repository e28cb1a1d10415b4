"""Embeddings by sentence-transformers: the last token, riding router losses, recall, the card."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from builders import picture
from datasets import Dataset
from ranks import WORLD_SIZE, on_ranks
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    MultipleNegativesRankingLoss,
)
from torch import nn
from torch.utils.data import BatchSampler, SequentialSampler
from transformers import TrainerCallback

from vlmoe import VLMoEForConditionalGeneration, VLMoEModel, VLMoEProcessor
from vlmoe.training.embedding import (
    RetrievalEvaluator,
    VLMoESentenceTransformerTrainer,
    embedding_model,
    evaluate_retrieval,
)

Gradients = dict[str, torch.Tensor]

TOLERANCE = 1e-5
IMAGES_PER_ROW = "num_images_per_sample"  # bookkeeping of sentence-transformers
WITHOUT_VLMOE = """
import sys
sys.modules["vlmoe"] = None
import torch
from sentence_transformers import SentenceTransformer
model = SentenceTransformer(sys.argv[1], trust_remote_code=True)
torch.save(model.encode(["a red circle"], convert_to_tensor=True), sys.argv[2])
"""
CAPTIONS = ("a red circle", "what is it?", "yes", "blue and a shape", "no", "two", "a", "it is")


def pairs(first: int = 0, last: int = 8) -> list[dict[str, Any]]:
    return [{"image": picture(i), "text": CAPTIONS[i]} for i in range(first, last)]


class Recorder(TrainerCallback):
    """Keeps the gradients of the step."""

    def on_pre_optimizer_step(self, *args: Any, model: nn.Module, **kwargs: Any) -> None:
        """Before the step; nothing was clipped."""
        self.gradients = named_gradients(model)


def named_gradients(model: nn.Module) -> Gradients:
    trained = (module for module in model.modules() if isinstance(module, VLMoEModel))
    parameters = next(trained).named_parameters()
    return {name: p.grad.clone() for name, p in parameters if p.grad is not None}


def in_order(dataset: Dataset, batch_size: int, drop_last: bool, **unused: Any) -> BatchSampler:
    return BatchSampler(SequentialSampler(dataset), batch_size, drop_last)


def trained(
    folder: Path,
    rows: list[dict[str, Any]],
    cached: bool = False,
    accumulate: int = 1,
    **options: Any,
) -> tuple[Gradients, VLMoESentenceTransformerTrainer]:
    """The gradients of one step, in as many processes as there are."""
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(folder / "output"),
        per_device_train_batch_size=len(rows) // (accumulate * ranks),
        gradient_accumulation_steps=accumulate,
        max_steps=1,
        max_grad_norm=0.0,
        batch_sampler=in_order,
        logging_steps=1,
        ddp_find_unused_parameters=False,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    model, recorder = embedding_model(folder), Recorder()
    kind: Any = CachedMultipleNegativesRankingLoss if cached else MultipleNegativesRankingLoss
    loss = kind(model, **{"mini_batch_size": 2} if cached else {})
    data = Dataset.from_list(rows)
    trainer = VLMoESentenceTransformerTrainer(
        model, arguments, train_dataset=data, loss=loss, callbacks=[recorder], **options
    )
    trainer.train()
    return recorder.gradients, trainer


def reference(folder: Path, rows: list[dict[str, Any]], micro_batches: int = 1) -> Gradients:
    """The mean over micro-batches of InfoNCE and the router losses, both written out."""
    model = VLMoEModel.from_pretrained(folder).train()
    embedder = embedding_model(folder)
    for part in range(micro_batches):
        size = len(rows) // micro_batches
        batch = rows[part * size : (part + 1) * size]
        states, losses = [], torch.zeros(())
        for column in ("image", "text"):
            inputs = embedder.preprocess([row[column] for row in batch])
            inputs = {k: inputs[k] for k in inputs if k not in ("modality", IMAGES_PER_ROW)}
            output = model(**inputs, output_router_logits=True)
            states.append(F.normalize(output.last_hidden_state[:, -1], dim=-1))  # padded left
            real, weights = inputs["attention_mask"].bool(), torch.full((size,), 1 / (2 * size))
            losses = model.router_losses(output.router_logits, real, weights).added_to(losses)
        logits = 20 * states[0] @ states[1].T
        loss = F.cross_entropy(logits, torch.arange(size)) + losses
        (loss / micro_batches).backward()
    return named_gradients(model)


def assert_equal(ours: Gradients, expected: Gradients) -> None:
    assert ours.keys() == expected.keys() and any("router" in name for name in ours)
    for name, gradient in expected.items():
        # a bias of keys has gradient zero in exact arithmetic, as softmax does not see a shift
        scale = expected[name.replace("k_proj.bias", "q_proj.bias")].norm()
        assert (ours[name] - gradient).norm() <= TOLERANCE * scale + 1e-9, name


@pytest.mark.parametrize(("cached", "accumulate"), [(False, 1), (True, 1), (False, 4), (True, 2)])
def test_the_gradient_is_that_of_the_loss_and_the_router_losses_in_one_piece(
    cached: bool, accumulate: int, model_folder: Path
) -> None:
    """Router losses have coefficient 1, so that they show."""
    ours, trainer = trained(model_folder, pairs(), cached, accumulate)
    assert_equal(ours, reference(model_folder, pairs(), accumulate))
    assert backbone(trainer.model).router_loss_ride is None


def backbone(model: SentenceTransformer) -> VLMoEModel:
    return model[0].model


def test_the_logged_losses_are_theirs_and_ours_apart(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each row of each column weighs the same, and each pass is counted once."""
    logs = []
    for cached in (False, True):
        _, trainer = trained(model_folder, pairs(), cached)
        (log,) = [entry for entry in trainer.state.log_history if "loss" in entry]
        logs.append(log)
    model, expected = embedding_model(model_folder), torch.zeros(())
    for column in ("image", "text"):
        inputs = model.preprocess([pair[column] for pair in pairs()])
        inputs = {k: inputs[k] for k in inputs if k not in ("modality", IMAGES_PER_ROW)}
        with torch.no_grad():
            output = backbone(model)(**inputs, output_router_logits=True)
        weights = torch.full((8,), 1 / 16)
        losses = backbone(model).router_losses(
            output.router_logits, inputs["attention_mask"].bool(), weights
        )
        expected = losses.added_to(expected)
    for log in logs:
        assert log["router_loss"] == pytest.approx(expected.item(), rel=1e-5)
        assert log["loss"] == pytest.approx(logs[0]["loss"], rel=1e-4) != log["router_loss"]


def gradients_on_a_rank(folder: Path, cached: bool) -> Gradients:
    return trained(folder, pairs(), cached, accumulate=1)[0]


@pytest.mark.slow
@pytest.mark.parametrize("cached", [False, True])
def test_two_ranks_make_the_update_of_two_micro_batches(
    cached: bool, model_folder: Path, tmp_path: Path
) -> None:
    expected = reference(model_folder, pairs(), WORLD_SIZE)
    for gradients in on_ranks(gradients_on_a_rank, model_folder, cached, folder=tmp_path):
        assert_equal(gradients, expected)


def test_embeddings_are_the_normalized_last_states_also_after_saving(
    model_folder: Path, processor: VLMoEProcessor, tmp_path: Path
) -> None:
    model = embedding_model(model_folder)
    for given in (["a red circle", "no"], [picture(1), picture(2)]):
        embeddings = model.encode(given, convert_to_tensor=True)
        for one, embedding in zip(given, embeddings, strict=True):  # alone: without padding
            inputs = model.preprocess([one])
            inputs = {k: inputs[k] for k in inputs if k not in ("modality", IMAGES_PER_ROW)}
            with torch.no_grad():
                states = backbone(model)(**inputs).last_hidden_state
            torch.testing.assert_close(embedding, F.normalize(states[0, -1], dim=-1))
    model.save_pretrained(str(tmp_path))
    head = VLMoEForConditionalGeneration.from_pretrained(model_folder)
    for same in (embedding_model(tmp_path), embedding_model(head, processor=processor)):
        assert torch.equal(same.encode(given, convert_to_tensor=True), embeddings)
    with pytest.raises(ValueError, match="was saved with pooling 'lasttoken', not 'mean'"):
        embedding_model(tmp_path, "mean")
    with pytest.raises(ValueError, match="`processor` is missing"):
        embedding_model(head)
    with pytest.raises(FileNotFoundError, match="no model folder nowhere"):
        embedding_model("nowhere")


@pytest.mark.slow
def test_a_saved_folder_opens_where_the_package_is_missing(
    model_folder: Path, tmp_path: Path
) -> None:
    model = embedding_model(model_folder)
    model.save_pretrained(str(tmp_path / "saved"))
    result = tmp_path / "embedding.pt"
    command = [sys.executable, "-c", WITHOUT_VLMOE, str(tmp_path / "saved"), str(result)]
    subprocess.run(command, check=True, cwd=tmp_path)
    expected = model.encode(["a red circle"], convert_to_tensor=True)
    torch.testing.assert_close(torch.load(result), expected)


def test_the_card_tells_recall_and_experts(model_folder: Path, tmp_path: Path) -> None:
    evaluator = RetrievalEvaluator(
        [pair["image"] for pair in pairs()], [pair["text"] for pair in pairs()], "shapes"
    )
    _, trainer = trained(model_folder, pairs(), evaluator=evaluator)
    figures = evaluator(trainer.model)
    assert figures["shapes_image_to_text_recall@10"] == 1
    assert evaluator.primary_metric == "shapes_mean_recall@1"
    trainer.save_model(str(tmp_path / "saved"))
    card = (tmp_path / "saved" / "README.md").read_text()
    assert "text_to_image_median_rank" in card and card.count("## Experts") == 1
    assert "4 experts in each sparse layer" in card and "router_z_loss_coef 1" in card


def test_recall_is_that_of_the_embeddings(model_folder: Path) -> None:
    """An image finds any of its captions; equal embeddings find nothing."""
    model = embedding_model(model_folder)
    images, captions = [picture(i) for i in range(4)], list(CAPTIONS[:4])
    found = evaluate_retrieval(model, images, captions)
    near = model.encode(images) @ model.encode(captions).T
    assert found.image_to_text.recall[1] == (near.argmax(1) == range(4)).mean()
    assert found.text_to_image.recall[1] == (near.argmax(0) == range(4)).mean()
    several = evaluate_retrieval(model, images[:2], [CAPTIONS[:3], CAPTIONS[3:4]])
    assert (several.image_to_text.queries, several.text_to_image.queries) == (2, 4)
    same = evaluate_retrieval(model, [images[0]] * 2, captions[:2])
    assert same.text_to_image.recall[1] == 0
    with pytest.raises(ValueError, match="'yes' stands 2 times; 1 of 2 captions"):
        evaluate_retrieval(model, images[:2], ["yes", "yes"])
    with pytest.raises(ValueError, match="4 images have 2 captions"):
        evaluate_retrieval(model, images, captions[:2])


def test_models_whose_routers_cannot_be_trained_so_are_refused(model_folder: Path) -> None:
    model = embedding_model(model_folder)
    backbone(model).config.text_config.router_bias_update_rate = 0.001
    with pytest.raises(ValueError, match=r"router_bias_update_rate is 0\.001, but the bias"):
        VLMoESentenceTransformerTrainer(model, loss=MultipleNegativesRankingLoss(model))
    backbone(model).config.text_config.router_bias_update_rate = 0.0
    model[0].model = nn.Linear(2, 2)
    with pytest.raises(TypeError, match="holds no VLMoEModel"):
        VLMoESentenceTransformerTrainer(model, loss=MultipleNegativesRankingLoss(model))


def test_without_sentence_transformers_the_error_names_the_extra(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delitem(sys.modules, "vlmoe.training.embedding")
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ImportError, match=r"pip install 'vlmoe\[retrieval\]'"):
        import vlmoe.training.embedding  # noqa: F401
