# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""A mixin for trainers whose every save, checkpoints included, holds card and provenance.

The card that a library would generate never takes the place of ours.
"""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import PreTrainedModel
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy

from ..hub.adapter_card import hide_base_model, tidy_adapter_card
from ..hub.atomic_files import atomic_path, open_to_readers, write_json
from ..hub.card_results import PIPELINE_TAG
from ..hub.input_errors import writing
from ..hub.json_files import JsonObject
from ..hub.meta_loading import without_bars
from ..hub.model_card import CARD_FILE, may_write, write_model_card
from ..hub.model_classes import answers_questions
from ..hub.provenance import (
    STAGES_FILE,
    RunOrigin,
    describe_stage,
    read_stages,
    starting_point,
)
from ..modeling_vlmoe.modeling_vlmoe import VLMoEForConditionalGeneration

if TYPE_CHECKING:
    from transformers import Trainer as Base
else:
    Base = object


class ModelCardMixin(Base):
    """Put before any subclass of `Trainer`: `class MyTrainer(ModelCardMixin, SFTTrainer)`.

    A model that answers no questions by itself, such as a PEFT adapter, keeps its library's card.

    Args:
        origin: what the trainer cannot know of the run; without it the card leaves it out.
    """

    def __init__(self, *args: object, origin: RunOrigin | None = None, **kwargs: object):
        super().__init__(*args, **kwargs)
        self.origin = origin or RunOrigin()
        model = self._own_model()
        if model is not None and self.args.should_save:
            # Read now: training may write into the folder that it starts from.
            self._start = starting_point(model, self.origin.preset)
            is_folder = self._start["kind"] == "folder"
            self._earlier_stages = read_stages(model.name_or_path) if is_folder else []

    def _save_checkpoint(self, *args: object, **kwargs: object) -> None:
        with writing(self.args.output_dir):
            super()._save_checkpoint(*args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save as `Trainer` does, and write the card beside the model."""
        with without_bars():  # one of a moment, for every checkpoint
            super().save_model(output_dir, _internal_call)
        folder, pushed = Path(output_dir or self.args.output_dir), Path(self.args.output_dir)
        pushes_saves = self.args.push_to_hub and self.args.hub_strategy != HubStrategy.END
        if self.args.should_save:
            open_to_readers(folder)
            self._tidy_adapter(folder, pushes_saves)
        self.write_card(folder)
        if pushes_saves and self.args.should_save and folder.parent == pushed:
            _copy_card(folder, pushed)  # Trainer copies weights and config there, then pushes it

    def _tidy_adapter(self, folder: Path, pushes_saves: bool) -> None:
        """Keep local paths out of an adapter's card, and out of a config that Trainer pushes."""
        model = self.accelerator.unwrap_model(self.model)
        base = model.get_base_model() if hasattr(model, "peft_config") else None
        if isinstance(base, VLMoEForConditionalGeneration):
            tidy_adapter_card(folder, PIPELINE_TAG)
            if pushes_saves and folder.name.startswith(PREFIX_CHECKPOINT_DIR):
                hide_base_model(folder)

    def create_model_card(self, **given: object) -> None:
        """Write our card where `Trainer` and TRL write theirs.

        Args:
            given: as for `Trainer`; `language`, `license`, `tags` and `model_name` go into the
                card, the others say what it tells anyhow.
        """
        if self._own_model() is None:
            super().create_model_card(**given)
            return
        used = {name: given.get(name) for name in ("language", "license", "tags", "model_name")}
        tags = [used["tags"]] if isinstance(used["tags"], str) else used["tags"]
        metadata = {name: value for name, value in used.items() if value} | {"tags": tags or []}
        self.write_card(self.args.output_dir, metadata)

    def write_card(self, folder: str | Path, metadata: JsonObject | None = None) -> None:
        """Write training_stages.json and the card into `folder`, if the whole model is there.

        Args:
            folder: where the model was saved.
            metadata: see `write_model_card`.
        """
        folder, model = Path(folder), self._own_model()
        if model is None or not self.args.should_save or not (folder / "config.json").is_file():
            return
        stage = describe_stage(model, self._start, self.origin, self.args, self.state)
        write_json(folder / STAGES_FILE, [*self._earlier_stages, stage])
        write_model_card(folder, repo_id=self.hub_model_id, metadata=metadata)

    def _own_model(self) -> PreTrainedModel | None:
        """Return the model without wrappers, if a card of ours can describe it."""
        model = self.accelerator.unwrap_model(self.model)
        return model if answers_questions(model) else None


def _copy_card(folder: Path, destination: Path) -> None:
    """Copy card and stages, unless the card there is its author's."""
    if not (folder / CARD_FILE).is_file() or not may_write(destination / CARD_FILE):
        return
    for name in (STAGES_FILE, CARD_FILE):
        with atomic_path(destination / name) as temporary:
            shutil.copyfile(folder / name, temporary)
