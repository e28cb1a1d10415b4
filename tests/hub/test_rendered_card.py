"""A card rendered from the files of a folder: valid metadata, the figures of the files, no more."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cards import COMMITTED, change, prose, read, snippets, tables
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results

from vlmoe import VLMoEForConditionalGeneration
from vlmoe.hub.model_card import CARD_FILE, MARKER, remove_evaluations, write_model_card
from vlmoe.hub.provenance import STAGES_FILE

HOSTILE = "a|b `c` \"d\": 'e'\n---\n# <b>f</b> [g](h) {{ i }} ```"


def test_the_committed_cards_are_what_their_files_render(tmp_path: Path) -> None:
    assert COMMITTED
    for folder in COMMITTED:
        copy = tmp_path / folder.name
        shutil.copytree(folder, copy)
        (copy / CARD_FILE).unlink()
        assert write_model_card(copy).read_text() == (folder / CARD_FILE).read_text()
        for file in folder.iterdir():
            assert file.stat().st_size < 150_000
            if file.suffix != ".png":
                assert not re.search(r"/(tmp|home|root|work|Users)\b", file.read_text()), file


def test_the_metadata_is_valid_and_its_results_make_a_round_trip(measured: Path) -> None:
    card = ModelCard.load(write_model_card(measured, repo_id="user/some-model"))
    data, metrics = card.data, read(measured / "metrics.json")
    assert (data.license, data.library_name) == ("apache-2.0", "transformers")
    assert (data.pipeline_tag, data.metrics) == ("image-text-to-text", ["exact_match"])
    assert {"vlmoe", "mixture-of-experts"} <= set(data.tags)
    assert data.datasets == [stage["data"]["name"] for stage in read(measured / STAGES_FILE)]
    assert data.get("base_model") is None and data.model_name == "some-model"
    values = {each.metric_name: each.metric_value for each in data.eval_results}
    assert values == {"exact match": metrics["accuracy"]} | {
        f"exact match ({kind})": share for kind, share in metrics["accuracy_by_type"].items()
    }
    index = eval_results_to_model_index("some-model", data.eval_results)
    assert index == data.to_dict()["model-index"]
    assert model_index_to_eval_results(index) == ("some-model", data.eval_results)
    assert ModelCard(card.content).data.to_dict() == data.to_dict()


def test_the_figures_are_those_of_the_files(measured: Path) -> None:
    def other_figures(metrics: dict[str, Any]) -> None:
        metrics["accuracy"], metrics["questions"] = 0.12345, 98765
        metrics["accuracy_by_type"] |= {"shape": 0.55555}
        metrics["questions_by_type"] |= {"shape": 4321}
        metrics["baselines"]["majority class"] |= {"exact_match": 0.01234}
        metrics["expert_load"]["max_over_mean"][1] = 7.654
        metrics["expert_load"]["unused_experts"][1] = 3

    for edit in (lambda metrics: None, other_figures):
        change(measured / "metrics.json", edit)
        metrics, stages = read(measured / "metrics.json"), read(measured / STAGES_FILE)
        found = tables(write_model_card(measured).read_text())

        kinds = {f"all questions ({metrics['questions']:,})": (metrics["accuracy"], None)} | {
            f"{kind} ({metrics['questions_by_type'][kind]:,})": (share, kind)
            for kind, share in metrics["accuracy_by_type"].items()
        }
        [results] = found["Results"]
        assert results.pop("") == ["this model", *metrics["baselines"]]
        results.pop("---")
        assert results == {
            row: [
                f"{value:.2%}"
                for value in (
                    share,
                    *(
                        each["exact_match"] if kind is None else each["exact_match_by_type"][kind]
                        for each in metrics["baselines"].values()
                    ),
                )
            ]
            for row, (share, kind) in kinds.items()
        }
        [routing] = found["Routing"]
        load = metrics["expert_load"]
        for position, layer in enumerate(("0", "1")):
            assert routing[layer] == [
                f"{load['max_over_mean'][position]:.2f}",
                f"{max(load['image_share'][position]) * 8:.2f}",
                f"{max(load['text_share'][position]) * 8:.2f}",
                str(load["unused_experts"][position]),
            ]
        [sizes] = found[measured.name]
        for row, key in (("parameters", "total"), ("active for an image token", "image_token")):
            assert sizes[row] == [f"{metrics['parameters'][key]:,}"]
        assert sizes["active for a text token"] == [f"{metrics['parameters']['text_token']:,}"]
        assert sizes["experts in each"] == ["8, top-2"] and sizes["vocabulary"] == ["372"]
        for number, stage in enumerate(stages, 1):
            [rows] = found[f"Stage {number}"]
            told, recipe = metrics["stages"][stage["data"]["name"]], stage["hyperparameters"]
            assert rows["optimizer steps"][0].startswith(f"{told['steps']:,} (")
            assert rows["seconds"] == [f"{round(told['train_seconds']):,}"]
            assert rows["training loss, last logged"] == [f"{told['train_loss']:.4g}"]
            assert rows["seed"] == [str(metrics["seed"])]
            assert f"weight decay {recipe['weight_decay']}," in rows["optimizer"][0]
            assert rows["hardware"][0].startswith(stage["hardware"]["device"])
        assert "![" in (measured / CARD_FILE).read_text()


@pytest.mark.parametrize(
    ("option", "tiles"),
    [("do_image_splitting", True), ("crop_to_patches", True), ("do_image_splitting", False)],
)
def test_tiling_is_told_whatever_the_image_processor_calls_it(
    measured: Path, option: str, tiles: bool
) -> None:
    processor = {"image_processor": {option: tiles}}
    (measured / "processor_config.json").write_text(json.dumps(processor))
    card = write_model_card(measured).read_text()
    assert ("large ones cut into tiles" in card) is tiles


def test_an_unknown_licence_is_not_invented(measured: Path) -> None:
    def from_the_hub(stages: list[dict[str, Any]]) -> None:
        stages[0]["start"] = {"kind": "hub", "name": "user/base", "base_model": "user/base"}
        stages[1]["start"]["license"] = None
        stages[1]["start"]["base_model"] = "user/base"

    change(measured / STAGES_FILE, from_the_hub)
    card = ModelCard.load(write_model_card(measured))
    assert card.data.license == "unknown" and card.data.base_model == "user/base"
    assert "license is not recorded" in card.text and "user/base" in card.text
    given = ModelCard.load(write_model_card(measured, metadata={"license": "mit", "tags": ["x"]}))
    assert given.data.license == "mit" and "license is not recorded" not in given.text
    assert "x" in given.data.tags and "vlmoe" in given.data.tags


def test_what_no_file_tells_is_left_out(
    tmp_path: Path, tiny_model: Callable[..., VLMoEForConditionalGeneration]
) -> None:
    model = tiny_model()
    model.config.save_pretrained(tmp_path)
    text = write_model_card(tmp_path).read_text()
    headings = re.findall(r"^## (.*)", text, flags=re.M)
    assert headings == ["Use", "Results", "Limits"]
    assert "No evaluation is recorded" in text and "expert_load.png" not in text
    assert not re.search(r"\bNone\b|\bnan\b|\{\{|\{%", text)
    data = ModelCard(text).data
    assert data.license == "unknown" and data.get("model-index") is None
    [sizes] = next(iter(tables(text).values()))
    assert sizes["parameters"] == [f"{model.active_parameters()['total']:,}"]
    dense = tiny_model(text={"mlp_only_layers": [0, 1, 2]})
    dense.config.save_pretrained(tmp_path)
    assert "experts in each" not in write_model_card(tmp_path).read_text()


def test_hostile_names_keep_the_card_valid(measured: Path) -> None:
    def rename(metrics: dict[str, Any]) -> None:
        metrics["dataset"] = metrics["split"] = HOSTILE
        for by_type in (
            metrics["accuracy_by_type"],
            metrics["questions_by_type"],
            *(each["exact_match_by_type"] for each in metrics["baselines"].values()),
        ):
            by_type[HOSTILE] = by_type.pop("shape")
        metrics["baselines"][HOSTILE] = metrics["baselines"].pop("question only")

    def rename_data(stages: list[dict[str, Any]]) -> None:
        for stage in stages:
            stage["data"] |= {"name": HOSTILE, "split": HOSTILE, "evaluation": HOSTILE}
            stage["start"] = {"kind": "hub", "name": HOSTILE, "base_model": HOSTILE}
            stage["hardware"]["device"] = HOSTILE

    change(measured / "metrics.json", rename)
    change(measured / STAGES_FILE, rename_data)
    metadata = {"model_name": HOSTILE, "license": "other", "license_name": HOSTILE}
    text = write_model_card(measured, repo_id=f"user/{HOSTILE}", metadata=metadata).read_text()
    data = ModelCard(text).data
    assert data.datasets == [HOSTILE] and data.model_name == HOSTILE
    assert data.base_model is None  # no id of the Hub
    assert data.eval_results[0].dataset_name == HOSTILE
    found = tables(text)  # all rows as wide as their headers
    assert {"Results", "Routing", "Stage 1", "Stage 2"} <= set(found)
    assert len(found["Results"][0]["---"]) == 3 and prose(text).count("\n# ") == 1
    codes = list(snippets(text))
    assert len(codes) == text.count("\n```python\n")
    for code in codes:
        [model] = re.findall(
            r'"image-text-to-text", model=(.*?)(?:, trust_remote_code|\)$)', code, re.M
        )
        assert json.loads(model) == f"user/{HOSTILE}"
        compile(code, "snippet", "exec")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", None, "holds no config.json"),
        ("config.json", '{"model_type": "clip"}', "no class that answers questions for .* 'clip'"),
        ("metrics.json", "{", "metrics.json: not valid JSON"),
        ("metrics.json", '{"accuracy": 1}', "metrics.json is not in the format"),
        ("evaluate_results.json", "[]", "evaluate_results.json: must hold an object"),
    ],
)
def test_files_that_cannot_be_read_are_named(
    measured: Path, file: str, content: str | None, message: str
) -> None:
    (measured / file).unlink(missing_ok=True)
    if content is not None:
        (measured / file).write_text(content)
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        write_model_card(measured)
    assert not (measured / CARD_FILE).exists()


def test_somebodys_own_files_are_renamed_and_not_deleted(tmp_path: Path) -> None:
    (tmp_path / "metrics.json").write_text("somebody's")
    remove_evaluations(tmp_path)
    assert (tmp_path / "_replaced-metrics.json").read_text() == "somebody's"
    (tmp_path / "metrics.json").write_text("of an older model")
    (tmp_path / STAGES_FILE).write_text("[]")
    remove_evaluations(tmp_path)
    assert not (tmp_path / "metrics.json").exists()


@pytest.mark.parametrize(
    "line",
    [
        MARKER,
        "<!-- Written by vlmoe from the files beside it, anew with every save; "
        "take this line out to keep your own changes. -->",
    ],
)
def test_a_card_with_the_line_of_this_or_an_earlier_version_is_overwritten(
    measured: Path, line: str
) -> None:
    card = measured / CARD_FILE
    card.write_text(f"---\n---\n{line}\n# Old\n")
    assert write_model_card(measured) == card
    assert MARKER in card.read_text() and "# Old" not in card.read_text()
    card.write_text(card.read_text().replace(MARKER, "Mine."))
    write_model_card(measured)
    assert "Mine." in card.read_text()
