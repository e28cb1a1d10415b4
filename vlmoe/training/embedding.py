# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Embeddings of images and texts with sentence-transformers: models, training, retrieval.

    model = embedding_model("outputs/tiny")
    loss = CachedMultipleNegativesRankingLoss(model, directions=("query_to_doc", "doc_to_query"))
    VLMoESentenceTransformerTrainer(model, train_dataset=pairs, loss=loss).train()
    evaluate_retrieval(model, images, captions)

Losses, GradCache, gathering across ranks, Matryoshka, evaluators and model cards are those of
sentence-transformers; a VLMoE folder loads there as it is. Here is what is ours alone: the router
losses under any loss, the last token as the embedding, and recall of images and captions.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn
from transformers import PreTrainedModel

from ..hub.saved_model import Processor, Source, require_model_source
from ..modeling_vlmoe.modeling_vlmoe import VLMoEModel
from ..tasks.retrieval import Retrieval, require_unique, retrieval
from .riding_losses import RouterLossRide, backbone_of

try:
    from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
    from sentence_transformers.base.evaluation import BaseEvaluator
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
except ImportError as error:
    raise ImportError(
        "vlmoe.training.embedding needs sentence-transformers: pip install 'vlmoe[retrieval]'"
    ) from error

MODULES_FILE = "modules.json"
EXPERTS_TITLE = "## Experts"


def embedding_model(
    folder_or_model: Source | PreTrainedModel,
    pooling: str = "lasttoken",
    *,
    processor: Processor | None = None,
    device: str | None = None,
) -> SentenceTransformer:
    """Return a model whose `encode` gives normalized embeddings of texts, images and chats.

    Args:
        folder_or_model: a saved model's folder or Hub id; a folder that sentence-transformers saved
            keeps its modules. Of a model in memory the embedding model is a copy.
        pooling: which hidden states make the embedding, see `Pooling` of sentence-transformers. In
            a decoder only the last token sees all others.
        processor: of a model in memory.
        device: by default a GPU where there is one.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it holds no whole model, it was saved with another pooling, or a model in memory
            comes without processor.
    """
    if isinstance(folder_or_model, PreTrainedModel):
        if processor is None:
            raise ValueError("`processor` is missing: give the model's, which reads its inputs.")
        with tempfile.TemporaryDirectory() as folder:
            folder_or_model.save_pretrained(folder)
            processor.save_pretrained(folder)
            return embedding_model(folder, pooling, device=device)
    source = str(folder_or_model)
    if (Path(source) / MODULES_FILE).is_file():
        model = SentenceTransformer(source, device=device)
        saved = [module.pooling_mode for module in model if isinstance(module, Pooling)]
        if saved and saved != [pooling]:
            raise ValueError(
                f"{source} was saved with pooling {saved[0]!r}, not {pooling!r}: give "
                f"pooling={saved[0]!r}."
            )
        return model
    require_model_source(source)
    states = Transformer(source)
    pooled = Pooling(states.get_embedding_dimension(), pooling)
    return SentenceTransformer(modules=[states, pooled, Normalize()], device=device)


class VLMoESentenceTransformerTrainer(SentenceTransformerTrainer):
    """sentence-transformers' trainer for VLMoE: the router losses ride, whatever the loss.

    Each row of each column, a text or an image, has the same weight in the router losses, as in a
    contrastive loss; over micro-batches and ranks Trainer takes the mean of both. They are logged
    as `router_loss`, with their coefficients; `loss` is that of sentence-transformers alone. Plain
    gradient accumulation gives no more negatives: take a cached loss for that.

    Raises:
        TypeError: the model holds no `VLMoEModel`.
        ValueError: its routers have a bias that moves; it is moved by hooks, and
            sentence-transformers calls `forward` past them.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        text_config = backbone_of(self.model).config.text_config
        if text_config.router_bias_update_rate:
            raise ValueError(
                f"router_bias_update_rate is {text_config.router_bias_update_rate}, but the bias "
                "does not move under sentence-transformers, which calls `forward` past the hooks "
                "that count choices. Set it to 0 and balance by router_aux_loss_coef."
            )
        self._ride: RouterLossRide | None = None
        self._router_losses: list[torch.Tensor] = []

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """Do theirs with riding router losses: cached losses run the model in the backward pass."""
        columns, _ = self.collect_features(inputs)
        if any("cu_seq_lens_q" in column for column in columns):
            raise ValueError(
                "The texts of a batch were concatenated into one row, but router losses are per "
                "row: set model[0].unpad_inputs = False."
            )
        rows = sum(len(column["input_ids"]) for column in columns)
        with RouterLossRide(model, 1 / rows) as self._ride:
            loss = super().training_step(model, inputs, *args, **kwargs)
        self._ride.require_arrival()
        if self._ride.total is not None:
            self._router_losses.append(self._ride.total)
        self._ride = None
        return loss

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """Compute theirs; in training it carries the router losses."""
        result = super().compute_loss(*args, **kwargs)
        if self._ride is None:
            return result
        loss, *outputs = result if isinstance(result, tuple) else (result,)
        loss = self._ride.carried_by(loss)
        return (loss, *outputs) if outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log theirs and the mean router loss since the last log."""
        if "loss" in logs and self._router_losses:
            mean = torch.stack(self._router_losses).mean()
            self._router_losses = []
            logs = logs | {"router_loss": round(self.accelerator.gather(mean).mean().item(), 6)}
        super().log(logs, *args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Save as they do; their card gets a section about the experts."""
        super()._save(output_dir, state_dict)
        card = Path(output_dir or self.args.output_dir, "README.md")
        text = card.read_text(encoding="utf-8") if card.is_file() else ""
        if text and EXPERTS_TITLE not in text:
            section = experts_section(backbone_of(self.model))
            card.write_text(f"{text.rstrip()}\n\n{section}", encoding="utf-8")


class RetrievalEvaluator(BaseEvaluator):
    """`evaluate_retrieval` for sentence-transformers' trainer and its card.

    Its figures are those of `Retrieval.as_dict`; the primary one is the mean of both recalls at 1.

    Args:
        images, captions, batch_size: as for `evaluate_retrieval`.
        name: goes before the figures' names.
    """

    def __init__(
        self,
        images: Sequence[Image.Image],
        captions: Sequence[str | Sequence[str]],
        name: str = "",
        batch_size: int = 32,
    ):
        super().__init__()
        self.primary_metric = "mean_recall@1"
        self.name, self._pairs, self._batch_size = name, (images, captions), batch_size

    def __call__(
        self,
        model: SentenceTransformer,
        output_path: str | None = None,
        epoch: int = -1,
        steps: int = -1,
    ) -> dict[str, float]:
        """Return the figures, and keep them for the card."""
        found = evaluate_retrieval(model, *self._pairs, batch_size=self._batch_size)
        both = found.image_to_text.recall[1] + found.text_to_image.recall[1]
        figures = self.prefix_name_to_metrics(
            {"mean_recall@1": both / 2} | found.as_dict(), self.name
        )
        self.store_metrics_in_model_card_data(model, figures, epoch, steps)
        return figures


def evaluate_retrieval(
    model: SentenceTransformer,
    images: Sequence[Image.Image],
    captions: Sequence[str | Sequence[str]],
    *,
    batch_size: int = 32,
) -> Retrieval:
    """Compute recall at 1, 5 and 10 and the median rank of images and captions, both ways.

    Args:
        model: embeds images and texts.
        images: all different; captions of equal pictures cannot be told apart.
        captions: one for each image, or a list of several for each; all different.
        batch_size: of encoding.

    Raises:
        ValueError: captions repeat, or there is not one entry for each image.
    """
    if len(images) != len(captions):
        raise ValueError(f"{len(images)} images have {len(captions)} captions; give one for each.")
    several = [[each] if isinstance(each, str) else list(each) for each in captions]
    texts = [text for of_image in several for text in of_image]
    require_unique(texts)
    of_images, of_texts = (
        model.encode(list(inputs), batch_size=batch_size, convert_to_tensor=True)
        for inputs in (images, texts)
    )
    owner = [i for i, of_image in enumerate(several) for _ in of_image]
    return retrieval(of_images @ of_texts.T, owner)


def experts_section(backbone: VLMoEModel) -> str:
    """Return a section of a model card about the experts and their losses."""
    config = backbone.config
    text = config.text_config
    total = sum(parameter.numel() for parameter in backbone.parameters())
    return (
        f"{EXPERTS_TITLE}\n\nThe backbone is a VLMoE: "
        f"{text.num_experts} experts in each sparse layer of the decoder, of which a token passes "
        f"{text.num_experts_per_tok}; {total:,} parameters. Its router losses "
        f"(router_aux_loss_coef {text.router_aux_loss_coef:g}, router_z_loss_coef "
        f"{text.router_z_loss_coef:g}) were trained beside the loss of sentence-transformers. "
        "Without the package `vlmoe` load it with `trust_remote_code=True`.\n"
    )
