"""The options of images reach every command that reads data."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from PIL import Image

from vlmoe import VLMoEForConditionalGeneration
from vlmoe.processing.processing_vlmoe import VLMoEProcessor
from vlmoe_cli import main

COMMANDS = ("train", "evaluate", "inspect", "data")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_model, processor: VLMoEProcessor) -> Path:
    """A folder with a model and a picture."""
    folder = tmp_path_factory.mktemp("options")
    model: VLMoEForConditionalGeneration = tiny_model(text={"vocab_size": len(processor.tokenizer)})
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    Image.new("RGB", (40, 30), "red").save(folder / "a.png")
    return folder


@pytest.fixture
def server(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """The URL of the picture, and the requests for it."""
    requests: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            requests.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write((folder / "a.png").read_bytes())

        def log_message(self, *args: object) -> None:
            pass

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{running.server_port}/a.png", requests
    running.shutdown()
    running.server_close()


def run(command: str, folder: Path, out: Path, picture: str, *options: str) -> int:
    """The exit code of a command on one row with this picture."""
    out.mkdir(exist_ok=True)
    question = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}
    row = {"messages": [question, {"role": "assistant", "content": "red"}], "images": [picture]}
    (out / "rows.jsonl").write_text(json.dumps(row))
    rows, model = str(out / "rows.jsonl"), ["--model", str(folder / "model")]
    argv = {
        "train": ["--dataset", rows, "--output_dir", str(out / "o"), "--use_cpu", "--max_steps=1"],
        "evaluate": ["--dataset", rows, "--split=train", "--output", str(out / "results.json")],
        "inspect": ["--dataset", rows, "--split=train", "--output_dir", str(out / "i")],
        "data": [rows, "--output", str(out / "data.png")],
    }[command]
    return main.main([command, *argv, *model, *options])


@pytest.mark.parametrize("command", COMMANDS)
def test_a_url_is_opened_on_request_only(
    command: str,
    folder: Path,
    server: tuple[str, list[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    url, requests = server
    assert run(command, folder, tmp_path / "a", url) == 2
    assert "is a URL" in "".join(capsys.readouterr())
    assert requests == []
    assert run(command, folder, tmp_path / "b", url, "--allow_image_urls") == 0
    assert requests


@pytest.mark.parametrize("command", COMMANDS)
def test_a_file_outside_the_folder_is_opened_on_request_only(
    command: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = str(folder / "a.png")
    assert run(command, folder, tmp_path / "a", picture) == 2
    assert "outside the dataset's folder" in "".join(capsys.readouterr())
    assert run(command, folder, tmp_path / "b", picture, "--allow_outside_images") == 0


@pytest.mark.parametrize(
    ("command", "option", "limit"),
    [*((command, "pixels", 1199) for command in COMMANDS), ("data", "side", 39)],
)
def test_limits_are_those_of_the_options(
    command: str,
    option: str,
    limit: int,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = ("--allow_outside_images", f"--max_image_{option}", str(limit))
    assert run(command, folder, tmp_path / "a", str(folder / "a.png"), *options) == 2
    assert "is 40x30 pixels; the limit is" in "".join(capsys.readouterr())
