# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Training: the trainer, its callbacks, checkpoints and evaluation.

- trainer.py: `VLMoETrainer`; build.py makes its model and processor, arguments.py its arguments;
- native.py, sparse_loss.py, router_outputs.py, strict_resume.py: models of transformers;
- group_lasso.py: neurons of experts that become zero;
- callbacks.py, telemetry.py: what guards a run and shows the routing;
- run.py, data.py, recipes.py: a whole run in a folder of its own; checkpoints.py: how it resumes;
- evaluation.py, metrics.py: questions asked and answers compared;
- riding_losses.py: router losses under a foreign loss; trl_trainers.py: under those of TRL,
  embedding.py and retrieval.py: under those of sentence-transformers.
"""

from typing import TYPE_CHECKING

from ..hub.lazy_names import lazy_names

if TYPE_CHECKING:
    from .callbacks import StopOnBadLoss as StopOnBadLoss
    from .checkpoints import last_complete_checkpoint as last_complete_checkpoint
    from .data import TrainingData as TrainingData
    from .embedding import RetrievalEvaluator as RetrievalEvaluator
    from .embedding import VLMoESentenceTransformerTrainer as VLMoESentenceTransformerTrainer
    from .embedding import embedding_model as embedding_model
    from .embedding import evaluate_retrieval as evaluate_retrieval
    from .evaluation import Evaluation as Evaluation
    from .evaluation import evaluate as evaluate
    from .group_lasso import GroupLasso as GroupLasso
    from .metrics import exact_match as exact_match
    from .riding_losses import RouterLossRide as RouterLossRide
    from .run import TrainResult as TrainResult
    from .run import train as train
    from .sparse_loss import SparseLoss as SparseLoss
    from .strict_resume import StrictResumeMixin as StrictResumeMixin
    from .telemetry import RouterTelemetry as RouterTelemetry
    from .trainer import VLMoETrainer as VLMoETrainer
    from .trl_trainers import VLMoEDPOTrainer as VLMoEDPOTrainer
    from .trl_trainers import VLMoESFTTrainer as VLMoESFTTrainer

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "Evaluation": "evaluation",
        "GroupLasso": "group_lasso",
        "RetrievalEvaluator": "embedding",
        "RouterLossRide": "riding_losses",
        "RouterTelemetry": "telemetry",
        "SparseLoss": "sparse_loss",
        "StopOnBadLoss": "callbacks",
        "StrictResumeMixin": "strict_resume",
        "TrainResult": "run",
        "TrainingData": "data",
        "VLMoEDPOTrainer": "trl_trainers",
        "VLMoESFTTrainer": "trl_trainers",
        "VLMoESentenceTransformerTrainer": "embedding",
        "VLMoETrainer": "trainer",
        "embedding_model": "embedding",
        "evaluate": "evaluation",
        "evaluate_retrieval": "embedding",
        "exact_match": "metrics",
        "last_complete_checkpoint": "checkpoints",
        "train": "run",
    },
)
