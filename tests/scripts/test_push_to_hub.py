"""`vlmoe push`: one commit or none, whatever fails on the way."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.utils._http as http
import numpy as np
import pytest
from hub_process import command, logits
from hub_server import READER, HubServer
from peft import get_peft_model
from safetensors.numpy import load_file, save_file

from vlmoe import VLMoEForConditionalGeneration, expert_lora_config

REPO = "tester/model"
CARD = "---\nlibrary_name: transformers\npipeline_tag: image-text-to-text\n---\n# A model\n"
AT_HOME = ("checkpoint-5", "runs", ".incoming", "training_args.bin", "optimizer.pt")
Process = Callable[..., Any]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory, saved_model: Path) -> Path:
    """The folder of a run: the model, and all that a run leaves beside it."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    shutil.copytree(saved_model, folder)
    (folder / "README.md").write_text(CARD)
    (folder / "code.py").write_text("answer = 42\n")
    (folder / "train_results.json").write_text('{"train_loss": 1.0}')
    (folder / "picture.png").write_bytes(b"png")
    for name in AT_HOME:
        path = folder / name
        if "." in name[1:]:
            path.write_bytes(b"")
        else:
            shutil.copytree(saved_model, path)
    for name in ("training_args.bin", "optimizer.pt"):
        shutil.make_archive(str(folder / name), "zip", saved_model)
        (folder / f"{name}.zip").rename(folder / name)
    return folder


@pytest.fixture(scope="module")
def other_folder(tmp_path_factory: pytest.TempPathFactory, run_folder: Path) -> Path:
    """The same run, with other weights."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    shutil.copytree(run_folder, folder)
    weights = load_file(folder / "model.safetensors")
    changed = {name: tensor * np.float32(1.25) for name, tensor in weights.items()}
    save_file(changed, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def expected(run_folder: Path, other_folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Logits of the two runs."""
    one, other = logits(run_folder), logits(other_folder)
    assert not np.array_equal(one, other)
    return one, other


def push(call: Process, folder: Path, *options: str, repo: str = REPO) -> str:
    """Push, and return what the command prints."""
    code, out, error = call(command, "push", str(folder), "--repo_id", repo, *options)
    assert code == 0, error
    return out


def refused(call: Process, folder: Path, *options: str, repo: str = REPO) -> str:
    """Push in vain, and return the error: the last line, with nothing but progress before it."""
    code, out, error = call(command, "push", str(folder), "--repo_id", repo, *options)
    assert code == 2 and out == "", (out, error)
    assert "Traceback" not in error
    return error.splitlines()[-1]


def test_a_push_is_one_commit_that_loads_bit_equal(
    hub: HubServer,
    hub_process: Process,
    run_folder: Path,
    other_folder: Path,
    expected: tuple[np.ndarray, np.ndarray],
) -> None:
    table = push(hub_process, run_folder, "--message", "First")
    assert [commit.message for commit in hub.commits(REPO)] == ["initial commit", "First"]
    first = hub.commits(REPO)[-1]
    assert hub.files(REPO) == {
        *("README.md", "code.py", "picture.png", "train_results.json", "model.safetensors"),
        *("config.json", "generation_config.json", "processor_config.json", "tokenizer.json"),
        *("tokenizer_config.json", "chat_template.jinja"),
        *(path.name for path in run_folder.glob("*.py")),
    }
    size = sum((run_folder / name).stat().st_size for name in hub.files(REPO))
    assert re.search(rf"repo +{REPO}\n", table) and re.search(rf"commit +{first.sha[:12]}\n", table)
    assert re.search(rf"files +{len(hub.files(REPO))}\n", table)
    assert re.search(rf"bytes +{size:,}\n", table) and f"/{REPO}/commit/{first.sha}" in table
    assert all(name in table for name in AT_HOME)
    assert np.array_equal(hub_process(logits, REPO), expected[0])

    push(hub_process, other_folder)
    assert [commit.message for commit in hub.commits(REPO)][1:] == ["First", "Upload tiny"]
    assert np.array_equal(hub_process(logits, REPO), expected[1])
    assert np.array_equal(hub_process(logits, REPO, first.sha), expected[0])


def test_weights_that_the_hub_has_are_not_uploaded_again(
    hub: HubServer, hub_process: Process, run_folder: Path, tmp_path: Path
) -> None:
    push(hub_process, run_folder)
    assert len(hub.requests("^PUT")) == 1
    hub.log.clear()
    assert "nothing new" in push(hub_process, run_folder)
    assert len(hub.commits(REPO)) == 2 and not hub.requests("^PUT|/commit/")

    folder = shutil.copytree(run_folder, tmp_path / "tiny")
    (folder / "README.md").write_text(CARD + "More text.\n")
    assert "nothing new" not in push(hub_process, folder)
    assert len(hub.commits(REPO)) == 3 and not hub.requests("^PUT")


def test_the_card_is_written_anew_unless_it_is_its_authors(
    hub: HubServer, hub_process: Process, run_folder: Path, tmp_path: Path
) -> None:
    push(hub_process, run_folder)
    assert hub.commits(REPO)[-1].files["README.md"].data.decode() == CARD
    folder = shutil.copytree(run_folder, tmp_path / "tiny")
    (folder / "README.md").unlink()
    push(hub_process, folder)
    card = hub.commits(REPO)[-1].files["README.md"].data.decode()
    assert "\npipeline_tag: image-text-to-text\n" in card and f'"{REPO}"' in card
    assert "nothing new" in push(hub_process, folder)
    push(hub_process, folder, repo="tester/other")
    other = hub.commits("tester/other")[-1].files["README.md"].data.decode()
    assert '"tester/other"' in other and REPO not in other


def requests_of_a_push(hub: HubServer, call: Process, folder: Path) -> list[str]:
    """The requests that pushing `folder` makes; the Hub stays as it was."""
    state = hub.state()
    hub.log.clear()
    push(call, folder)
    requests = hub.requests()
    hub.reset(state)
    return requests


@pytest.mark.slow
def test_after_a_failure_at_any_request_the_old_revision_loads_and_a_second_push_succeeds(
    hub: HubServer,
    hub_process: Process,
    run_folder: Path,
    other_folder: Path,
    expected: tuple[np.ndarray, np.ndarray],
) -> None:
    push(hub_process, run_folder)
    state, old = hub.state(), hub.commits(REPO)
    requests = requests_of_a_push(hub, hub_process, other_folder)
    parts = ("repos/create", "validate-yaml", "preupload", "lfs/obj", "PUT", "verify", "/commit/")
    assert all(any(part in request for request in requests) for part in parts)
    for number, request in enumerate(requests):
        hub.reset(state)
        hub.fail(number, 507)
        error = refused(hub_process, other_folder)
        assert error.startswith(f"vlmoe push: error: {REPO}: the Hub answered 507: "), request
        assert [commit.sha for commit in hub.commits(REPO)] == [commit.sha for commit in old]
        assert np.array_equal(hub_process(logits, REPO), expected[0]), request

        hub.fault = None
        push(hub_process, other_folder)
        assert len(hub.commits(REPO)) == len(old) + 1, request
        assert np.array_equal(hub_process(logits, REPO), expected[1]), request


def without_waiting(argv: list[str]) -> tuple[int, str, str]:
    """`command`, without the pauses that huggingface_hub makes before it tries again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(http.time, "sleep", lambda seconds: None)
        return command(*argv)


def test_without_a_server_the_old_revision_stays_and_the_error_names_the_repo(
    hub: HubServer, hub_process: Process, run_folder: Path, other_folder: Path
) -> None:
    push(hub_process, run_folder)
    state, old = hub.state(), hub.commits(REPO)
    argv = ["push", str(other_folder), "--repo_id", REPO]
    for number, request in enumerate(requests_of_a_push(hub, hub_process, other_folder)):
        hub.reset(state)
        hub.fail(number, "drop", times=float("inf"))
        code, _, error = hub_process(without_waiting, argv)
        last = error.splitlines()[-1]
        assert code == 2 and last.startswith(f"vlmoe push: error: {REPO}: the connection"), error
        assert [commit.sha for commit in hub.commits(REPO)] == [commit.sha for commit in old]

        hub.fault = None
        push(hub_process, other_folder)
        assert len(hub.commits(REPO)) == len(old) + 1, request


def test_a_lost_answer_makes_no_second_commit(
    hub: HubServer, hub_process: Process, run_folder: Path, other_folder: Path
) -> None:
    push(hub_process, run_folder)
    requests = requests_of_a_push(hub, hub_process, other_folder)
    hub.fail(len(requests) - 1, "lose")
    argv = ["push", str(other_folder), "--repo_id", REPO]
    code, _, error = hub_process(without_waiting, argv)
    assert code == 2 and f"{REPO}: the connection failed" in error
    assert len(hub.commits(REPO)) == 3
    assert "nothing new" in push(hub_process, other_folder)
    assert len(hub.commits(REPO)) == 3


@pytest.mark.parametrize(
    ("repo", "options", "status", "remedy"),
    [
        (REPO, ["--token", "hf_wrong"], 401, "run `hf auth login`, or set HF_TOKEN"),
        ("tester/new", ["--token", "hf_wrong"], 401, "run `hf auth login`, or set HF_TOKEN"),
        (REPO, ["--token", READER], 403, "a repo in your own namespace"),
        ("somebody/new", [], 403, "a repo in your own namespace"),
        (REPO, ["--revision", "refs/pr/7"], 404, "check the name of the repo"),
    ],
)
def test_a_refusal_is_one_line_with_the_repo_and_the_remedy(
    hub: HubServer,
    hub_process: Process,
    run_folder: Path,
    repo: str,
    options: list[str],
    status: int,
    remedy: str,
) -> None:
    push(hub_process, run_folder)
    code, out, error = hub_process(command, "push", str(run_folder), "--repo_id", repo, *options)
    assert (code, out, error.count("\n")) == (2, "", 1), error
    assert error.startswith(f"vlmoe push: error: {repo}: the Hub answered {status}: ")
    assert remedy in error
    assert len(hub.commits(REPO)) == 2 and hub.repos.keys() == {REPO}


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_refusal_at_any_request_is_one_line(
    hub: HubServer, hub_process: Process, run_folder: Path, status: int
) -> None:
    state = hub.state()
    count = len(requests_of_a_push(hub, hub_process, run_folder))
    for number in range(count):
        hub.reset(state)
        hub.fail(number, status, times=float("inf"))
        error = refused(hub_process, run_folder)
        assert error.startswith(f"vlmoe push: error: {REPO}: the Hub answered {status}: "), number


def test_a_branch_is_made_and_main_stays(
    hub: HubServer, hub_process: Process, run_folder: Path, other_folder: Path
) -> None:
    push(hub_process, run_folder, "--private")
    assert hub.repos[REPO].private
    for folder in (other_folder, run_folder):
        push(hub_process, folder, "--revision", "experiment")
    assert len(hub.commits(REPO)) == 2
    branch = hub.commits(REPO, "experiment")
    assert len(branch) == 3 and branch[0].sha == hub.commits(REPO)[-1].sha


def test_weights_of_an_older_push_do_not_stay_beside_the_new_ones(
    hub: HubServer,
    hub_process: Process,
    run_folder: Path,
    other_folder: Path,
    tmp_path: Path,
    expected: tuple[np.ndarray, np.ndarray],
) -> None:
    push(hub_process, run_folder)
    folder = shutil.copytree(other_folder, tmp_path / "sharded")
    shard(folder)
    hub.log.clear()
    push(hub_process, folder)
    assert len(hub.requests("^PUT")) == 2 and len(hub.commits(REPO)) == 3
    assert {name for name in hub.files(REPO) if "safetensors" in name} == {
        *("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"),
        "model.safetensors.index.json",
    }
    assert np.array_equal(hub_process(logits, REPO), expected[1])


def shard(folder: Path) -> None:
    """Split `model.safetensors` into two files with an index."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names, weight_map = sorted(weights), {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-{number:05}-of-00002.safetensors"
        save_file({name: weights[name] for name in part}, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_a_folder_that_nobody_could_load_is_not_pushed(
    hub: HubServer, hub_process: Process, run_folder: Path, tmp_path: Path
) -> None:
    def broken(name: str, change: Callable[[Path], Any]) -> str:
        folder = shutil.copytree(run_folder, tmp_path / name)
        change(folder)
        return refused(hub_process, folder)

    def as_pickle(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        (folder / "optimizer.pt").rename(folder / "pytorch_model.bin")

    def cut(folder: Path) -> None:
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-8])

    def lose_a_shard(folder: Path) -> None:
        shard(folder)
        (folder / "model-00002-of-00002.safetensors").unlink()

    assert "pytorch_model.bin: pickled weights" in broken("pickle", as_pickle)
    assert "model.safetensors: damaged" in broken("cut", cut)
    assert "model-00002-of-00002.safetensors is missing" in broken("shards", lose_a_shard)
    no_config = broken("no_config", lambda folder: (folder / "config.json").unlink())
    assert "config.json: missing" in no_config
    bad_card = "---\nlibrary_name: [1, 2]\n---\n"
    card = broken("card", lambda folder: (folder / "README.md").write_text(bad_card))
    assert "Invalid metadata in README.md" in card and '"library_name" must be' in card
    assert hub.repos.keys() <= {REPO} and not hub.requests("/commit/|^PUT")


def pushed_while_another_push_finishes(folder: str, repo: str) -> str:
    """Push while another commit arrives between the look at the branch and ours."""
    from huggingface_hub import HfApi

    import vlmoe

    class OvertakenApi(HfApi):
        def create_commit(self, repo_id: str, operations: Any, **arguments: Any) -> Any:
            HfApi().upload_file(path_or_fileobj=b"x", path_in_repo="new.txt", repo_id=repo_id)
            return super().create_commit(repo_id, operations, **arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.HfApi", OvertakenApi)
        with pytest.raises(OSError) as caught:
            vlmoe.push(folder, repo)
    return str(caught.value)


def test_a_push_that_is_overtaken_changes_nothing(
    hub: HubServer, hub_process: Process, run_folder: Path, other_folder: Path
) -> None:
    push(hub_process, run_folder)
    error = hub_process(pushed_while_another_push_finishes, str(other_folder), REPO)
    assert error.startswith(f"{REPO}: the Hub answered 412: ") and "push again" in error
    assert len(hub.commits(REPO)) == 3
    assert hub.files(REPO) > hub.files(REPO, hub.commits(REPO)[1].sha)


@pytest.fixture
def adapter(saved_model: Path, tmp_path: Path) -> Path:
    """An adapter as PEFT saves it, of a model in a folder."""
    base = VLMoEForConditionalGeneration.from_pretrained(saved_model)
    get_peft_model(base, expert_lora_config(base)).save_pretrained(tmp_path / "adapter")
    card = tmp_path / "adapter" / "README.md"
    card.write_text(f"{card.read_text()}\nTrained from [{saved_model}](x).\n")
    return tmp_path / "adapter"


def uploaded(folder: str, repo: str) -> str:
    """Upload a folder without us; returns the Hub's refusal, if it refuses."""
    from huggingface_hub import HfApi

    HfApi().create_repo(repo)
    try:
        HfApi().upload_folder(repo_id=repo, folder_path=folder)
    except ValueError as error:
        return str(error)
    return ""


def test_a_pushed_adapter_tells_no_path_of_this_machine(
    hub: HubServer, hub_process: Process, adapter: Path, saved_model: Path
) -> None:
    assert '"base_model" with value' in hub_process(uploaded, str(adapter), "tester/plain")
    before = {file: file.read_bytes() for file in adapter.iterdir()}
    code, table, error = hub_process(command, "push", str(adapter), "--repo_id", REPO)
    assert code == 0, error
    assert f"{saved_model}, is a folder of this machine" in error and "Push it too" in error
    files = hub.commits(REPO)[-1].files
    assert not any(str(saved_model).encode() in file.data for file in files.values())
    config = json.loads(files["adapter_config.json"].data)
    kept = json.loads((adapter / "adapter_config.json").read_text())
    assert kept.pop("base_model_name_or_path") == str(saved_model)
    assert config.pop("base_model_name_or_path") is None and config == kept
    card = files["README.md"].data.decode()
    assert f"Trained from [{saved_model.name}](x)." in card and "base_model" not in card
    assert re.search(
        rf"bytes +{sum(len(f.data) for n, f in files.items() if n[0] != '.'):,}\n", table
    )
    assert {file: file.read_bytes() for file in adapter.iterdir()} == before


def test_an_adapter_of_a_model_of_the_hub_names_it(
    hub: HubServer, hub_process: Process, adapter: Path, saved_model: Path
) -> None:
    for name in ("adapter_config.json", "README.md"):
        file = adapter / name
        file.write_text(file.read_text().replace(str(saved_model), "user/base"))
    push(hub_process, adapter)
    files = hub.commits(REPO)[-1].files
    for name in ("adapter_config.json", "README.md"):
        assert (
            files[name].data == (adapter / name).read_bytes() and b"user/base" in files[name].data
        )
