"""A dataset's pictures are bytes or files below its folder; whatever else it names stays shut."""

import base64
import http.server
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet as pq
import pytest
from builders import plain_chat, user
from builders import png as encoded
from PIL import Image

from vlmoe.data.collator import VLMoECollator, VLMoEPreferenceCollator, VLMoEPromptCollator
from vlmoe.data.images import open_image
from vlmoe.data.loading import load_rows
from vlmoe.processing.processing_vlmoe import VLMoEProcessor

QUESTION = user("what?", 1)
ANSWER = {"role": "assistant", "content": [{"type": "text", "text": "a shape"}]}
UNDECODED = datasets.List(datasets.Image(decode=False))


@pytest.fixture
def picture(make_image: Callable[..., Image.Image]) -> Image.Image:
    return make_image(seed=4, size=(64, 64))


@pytest.fixture
def png(picture: Image.Image) -> bytes:
    return encoded(picture)


@pytest.fixture
def dataset_folder(tmp_path: Path, png: bytes) -> Path:
    """A dataset's folder with one picture, a picture beside it, and links to the latter."""
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "pictures").mkdir()
    (folder / "pictures" / "in.png").write_bytes(png)
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "out.png").write_bytes(png)
    (folder / "link.png").symlink_to(tmp_path / "secret" / "out.png")
    (folder / "linked").symlink_to(tmp_path / "secret")
    return folder


class Server:
    """Answers each GET with a picture and remembers its path."""

    def __init__(self, content: bytes) -> None:
        requests: list[str] = []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                requests.append(self.path)
                self.send_response(200)
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *args: object) -> None:
                pass

        self.requests = requests
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/a.png"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def server(png: bytes) -> Iterator[Server]:
    running = Server(png)
    yield running
    running.server.shutdown()
    running.server.server_close()


def write_rows(folder: Path, picture: Any, form: str) -> Path:
    """A dataset whose second row has this picture, in JSON or in a typed column."""
    messages = [QUESTION, ANSWER]
    good = str(Path("pictures") / "in.png")
    if form == "json":
        path = folder / "train.jsonl"
        rows = [{"messages": messages, "images": [image]} for image in (good, picture)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path
    path = folder / "train.parquet"
    entries = [{"bytes": None, "path": good}, {"bytes": None, "path": picture}]
    kind: Any = datasets.Image(decode=False)
    values: list[Any] = entries
    if form == "typed list":
        kind, values = datasets.List(kind), [[entry] for entry in entries]
    rows = datasets.Dataset.from_dict({"messages": [messages] * 2})
    write_parquet(rows.add_column("images", values, feature=kind), path)
    return path


def write_parquet(rows: datasets.Dataset, path: Path) -> None:
    """As `to_parquet`, which would put the files' bytes into the rows."""
    pq.write_table(rows.data.table, path)


FORMS = ["json", "typed", "typed list"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("whole_folder", [False, True])
@pytest.mark.parametrize(
    "written",
    ["../secret/out.png", "absolute", "link.png", "linked/out.png", "..\\secret\\out.png"],
)
def test_a_file_outside_the_folder_is_refused_by_row_and_picture(
    dataset_folder: Path, form: str, whole_folder: bool, written: str
) -> None:
    outside = dataset_folder.parent / "secret" / "out.png"
    written = str(outside) if written == "absolute" else written
    path = write_rows(dataset_folder, written, form)
    source = str(dataset_folder if whole_folder else path)
    with pytest.raises(
        ValueError, match=r"row 1, image 0: .*outside the dataset's folder .*allow_outside_images"
    ):
        load_rows(source)
    rows = load_rows(source, allow_outside_images=True)
    assert rows[1]["images"] == [{"bytes": None, "path": str(outside)}]


def test_a_caption_or_picture_that_is_a_link_out_of_the_folder_is_refused(
    tmp_path: Path, png: bytes
) -> None:
    (tmp_path / "secret.txt").write_text("a secret")
    (tmp_path / "secret.png").write_bytes(png)
    for kind in ("txt", "png"):
        folder = tmp_path / kind
        folder.mkdir()
        (folder / "a.png").write_bytes(png)
        (folder / "a.txt").write_text("a shape")
        (folder / f"a.{kind}").unlink()
        (folder / f"a.{kind}").symlink_to(tmp_path / f"secret.{kind}")
        with pytest.raises(ValueError, match=rf"a\.{kind}.* is .*secret\.{kind}, outside"):
            load_rows(str(folder))
        assert len(load_rows(str(folder), allow_outside_images=True)) == 1


@pytest.mark.parametrize("form", FORMS)
def test_files_of_the_folder_are_found_whatever_the_working_directory(
    dataset_folder: Path, form: str, picture: Image.Image
) -> None:
    (dataset_folder / "again.png").symlink_to("pictures/in.png")
    for written in ("again.png", str(dataset_folder / "pictures" / "in.png"), "pictures\\in.png"):
        rows = load_rows(str(write_rows(dataset_folder, written, form)))
        for row in rows:
            assert open_image(row["images"][0], "x").tobytes() == picture.tobytes()


def test_a_file_may_lie_anywhere_below_the_folder_that_is_read(dataset_folder: Path) -> None:
    below = dataset_folder / "split"
    below.mkdir()
    rows = [{"messages": [QUESTION, ANSWER], "images": ["../pictures/in.png"]}]
    (below / "train.jsonl").write_text(json.dumps(rows[0]))
    assert len(load_rows(str(dataset_folder))) == 1
    with pytest.raises(ValueError, match="outside the dataset's folder"):
        load_rows(str(below / "train.jsonl"))


def test_a_snapshot_in_the_hubs_cache_may_be_read_as_a_folder(tmp_path: Path, png: bytes) -> None:
    snapshot = tmp_path / "datasets--a--b" / "snapshots" / "abc"
    blob = tmp_path / "datasets--a--b" / "blobs" / "1"
    for folder in (snapshot, blob.parent):
        folder.mkdir(parents=True)
    blob.write_bytes(png)
    (snapshot / "a.png").symlink_to(Path("../../blobs/1"))
    row = {"messages": [QUESTION, ANSWER], "images": ["a.png"]}
    (snapshot / "train.jsonl").write_text(json.dumps(row))
    for source in (snapshot, snapshot / "train.jsonl"):
        assert load_rows(str(source))[0]["images"] == [{"bytes": None, "path": str(blob)}]


@pytest.mark.parametrize("form", FORMS)
def test_no_request_is_made_for_a_url_in_data(
    dataset_folder: Path, form: str, server: Server, processor: VLMoEProcessor
) -> None:
    path = str(write_rows(dataset_folder, server.url, form))
    with pytest.raises(ValueError, match=r"row 1, image 0: .*is a URL.*allow_image_urls"):
        load_rows(path)
    with pytest.raises(ValueError, match=r"row 1, image 0: .*is a URL"):
        load_rows(path, allow_outside_images=True)
    rows = load_rows(path, allow_image_urls=True)
    with pytest.raises(ValueError, match=r"row 'train\[1\]'.*image 0: .*is a URL"):
        VLMoECollator(processor)(rows)
    assert server.requests == []
    batch = VLMoECollator(processor, allow_image_urls=True)(rows)
    assert server.requests == ["/a.png"]
    assert "image_index" in batch  # both rows have the same picture


@pytest.mark.parametrize("url", ["ftp://a/b.png", "s3://a/b.png", "file:///a.png", "hf://a/b"])
@pytest.mark.parametrize("form", FORMS)
def test_urls_of_other_kinds_are_never_opened(dataset_folder: Path, form: str, url: str) -> None:
    path = str(write_rows(dataset_folder, url, form))
    with pytest.raises(ValueError, match=r"row 1, image 0: .*a URL of a kind that is not opened"):
        load_rows(path, allow_image_urls=True, allow_outside_images=True)


@pytest.mark.parametrize("wrap", [lambda url: url, lambda url: {"bytes": None, "path": url}])
def test_no_collator_opens_a_url_by_default(
    processor: VLMoEProcessor, server: Server, wrap: Callable[[str], Any]
) -> None:
    row = {"messages": [QUESTION, ANSWER], "images": [wrap(server.url)]}
    pair = {"prompt": [QUESTION], "chosen": [ANSWER], "rejected": [ANSWER]} | row
    for make in (VLMoECollator, VLMoEPromptCollator, VLMoEPreferenceCollator):
        with pytest.raises(ValueError, match=r"row 0 of the batch .*image 0: .*allow_image_urls"):
            make(processor)([pair])
    with pytest.raises(ValueError, match="is a URL"):
        open_image(wrap(server.url), "x")
    assert server.requests == []
    for make in (VLMoECollator, VLMoEPromptCollator, VLMoEPreferenceCollator):
        make(processor, allow_image_urls=True)([pair])
    assert set(server.requests) == {"/a.png"}


def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, rows: datasets.Dataset) -> Path:
    """A Hub whose only dataset has these rows; gives the folder of its files in the cache."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(datasets.config, "EXTRACTED_DATASETS_PATH", tmp_path / "extracted")
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: rows)
    snapshot = tmp_path / "hub" / "datasets--someone--something" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    return snapshot


@pytest.mark.parametrize("typed", [False, True])
def test_hub_pictures_lie_in_the_datasets_own_part_of_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, png: bytes, typed: bool, server: Server
) -> None:
    def read(path: Path | str, **allowed: bool) -> datasets.Dataset:
        rows = datasets.Dataset.from_dict({"messages": [[QUESTION, ANSWER]]})
        if typed:
            entry = {"bytes": None, "path": str(path)}
            rows = rows.add_column("images", [[entry]], feature=UNDECODED)
        else:
            rows = rows.add_column("images", [[str(path)]])
        with monkeypatch.context() as patch:
            patch.setattr(datasets, "load_dataset", lambda *args, **kwargs: rows)
            return load_rows("someone/something", **allowed)

    snapshot = hub(monkeypatch, tmp_path, datasets.Dataset.from_dict({}))
    other = tmp_path / "hub" / "datasets--someone--other"
    inside = (snapshot / "a.png", tmp_path / "extracted" / "xyz" / "a.png")
    outside = (other / "a.png", tmp_path / "a.png", tmp_path / "hub" / "a.png")
    for file in (*inside, *outside):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(png)
    blob = snapshot.parent.parent / "blobs" / "1"  # snapshots are links into blobs
    blob.parent.mkdir()
    blob.write_bytes(png)
    (snapshot / "b.png").symlink_to(blob)
    for file in (*inside, snapshot / "b.png"):
        assert len(read(file)) == 1
    for file in outside:
        with pytest.raises(ValueError, match=r"row 0, image 0: .*outside"):
            read(file)
        assert len(read(file, allow_outside_images=True)) == 1
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"row 0, image 0: 'a\.png' is .*outside"):
        read("a.png")  # of the working directory
    with pytest.raises(FileNotFoundError, match=r"no image file b\.png.*hf download someone/some"):
        read("b.png")
    with pytest.raises(ValueError, match=r"row 0, image 0: .*is a URL"):
        read(server.url)
    assert server.requests == []


@pytest.mark.parametrize("form", ["json", "typed", "typed list"])
@pytest.mark.parametrize("prefix", ["", "data:image/png;base64,", "DATA:;base64,"])
@pytest.mark.parametrize("side", [1, 64, 200])
def test_base64_is_a_picture_everywhere(
    dataset_folder: Path,
    form: str,
    prefix: str,
    side: int,
    make_image: Callable[..., Image.Image],
    processor: VLMoEProcessor,
) -> None:
    image = make_image(seed=9, size=(side, side))
    content = encoded(image)
    text = prefix + base64.b64encode(content).decode()
    rows = load_rows(str(write_rows(dataset_folder, text, form)))
    assert rows[1]["images"] == [{"bytes": content, "path": None}]
    whole = {"messages": [QUESTION, ANSWER]}
    given = VLMoECollator(processor)([whole | {"images": [text]}])
    wanted = VLMoECollator(processor)([whole | {"images": [image]}])
    assert (given["pixel_values"] == wanted["pixel_values"]).all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "written", ["pictures/missing", "missing.png", "a" * 5000, "a\0b", "", "data:text/plain,hello"]
)
def test_what_is_no_picture_is_refused_by_row(
    dataset_folder: Path, form: str, written: str
) -> None:
    path = str(write_rows(dataset_folder, written, form))
    with pytest.raises(FileNotFoundError, match=r"row 1, image 0: there is no image file") as error:
        load_rows(path)
    assert len(str(error.value)) < 400


def test_bytes_in_data_are_not_replaced_by_a_file_of_the_path_beside_them(
    tmp_path: Path, png: bytes, monkeypatch: pytest.MonkeyPatch, make_image: Callable[..., Any]
) -> None:
    monkeypatch.chdir(tmp_path)
    make_image(seed=1).save(tmp_path / "a.png")
    rows = datasets.Dataset.from_dict({"messages": [[QUESTION, ANSWER]] * 2})
    entries = [[{"bytes": png, "path": "a.png"}], [{"bytes": None, "path": "a.png"}]]
    write_parquet(rows.add_column("images", entries, feature=UNDECODED), Path("rows.parquet"))
    first, second = load_rows("rows.parquet")
    assert first["images"] == [{"bytes": png, "path": None}]
    assert second["images"] == [{"bytes": None, "path": str(tmp_path / "a.png")}]


@pytest.mark.parametrize("as_list", [False, True])
def test_a_picture_without_bytes_and_path_hides_no_other(
    tmp_path: Path, as_list: bool, server: Server
) -> None:
    entries = [{"bytes": None, "path": path} for path in (None, server.url)]
    values: list[Any] = [[entry] for entry in entries] if as_list else entries
    kind: Any = datasets.Image(decode=False)
    rows = datasets.Dataset.from_dict({"messages": [[QUESTION, ANSWER]] * 2})
    rows = rows.add_column("images", values, feature=datasets.List(kind) if as_list else kind)
    write_parquet(rows, tmp_path / "rows.parquet")
    with pytest.raises(ValueError, match="row 0, image 0: expected a file path, got None"):
        load_rows(str(tmp_path / "rows.parquet"))


BYTES_AND_PATH = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}


@pytest.mark.parametrize(
    ("kind", "wrap"),
    [
        (datasets.List(datasets.Image(), length=1), lambda png: [{"bytes": png, "path": None}]),
        (datasets.LargeList(datasets.Image()), lambda png: [{"bytes": png, "path": None}]),
        (datasets.List(BYTES_AND_PATH), lambda png: [{"bytes": png, "path": None}]),
        (datasets.Value("large_binary"), lambda png: png),
        (datasets.List(datasets.Value("binary")), lambda png: [png]),
        (datasets.Value("large_string"), lambda png: base64.b64encode(png).decode()),
    ],
)
def test_pictures_may_be_stored_in_other_types(
    tmp_path: Path, png: bytes, kind: Any, wrap: Callable[[bytes], Any]
) -> None:
    rows = datasets.Dataset.from_dict({"messages": [[QUESTION, ANSWER]] * 2})
    rows = rows.add_column("images", [wrap(png)] * 2, feature=kind)
    write_parquet(rows, tmp_path / "rows.parquet")
    loaded = load_rows(str(tmp_path / "rows.parquet"))
    assert loaded.features["images"] == UNDECODED
    assert loaded["images"][:] == [[{"bytes": png, "path": None}]] * 2


IMAGE = datasets.Image()
TEXT = datasets.Value("string")
PLAIN = datasets.List({"role": TEXT, "content": TEXT})


@pytest.mark.parametrize(
    ("column", "kind", "wrap"),
    [
        ("images", datasets.LargeList(IMAGE), lambda entry: [entry]),
        ("images", {"picture": IMAGE}, lambda entry: {"picture": entry}),
        ("id", IMAGE, lambda entry: entry),
        ("question_type", IMAGE, lambda entry: entry),
        ("question_type", datasets.List(IMAGE), lambda entry: [entry]),
        ("question_type", datasets.Video(), lambda entry: entry),
        ("another", IMAGE, lambda entry: entry),
        (
            "messages",
            datasets.List({"role": TEXT, "content": TEXT, "picture": IMAGE}),
            lambda entry: [{"role": "user", "content": "a", "picture": entry}],
        ),
        (
            "messages",
            datasets.List(
                {"role": TEXT, "content": datasets.List({"type": TEXT, "text": TEXT, "url": IMAGE})}
            ),
            lambda entry: [
                {"role": "user", "content": [{"type": "image", "text": None, "url": entry}]}
            ],
        ),
        (
            "messages",
            datasets.List({"role": TEXT, "content": datasets.List({"type": TEXT, "text": IMAGE})}),
            lambda entry: [{"role": "user", "content": [{"type": "text", "text": entry}]}],
        ),
    ],
)
@pytest.mark.parametrize("options", [{}, {"with_images": False}])
def test_a_column_of_media_makes_no_request_wherever_it_stands(
    tmp_path: Path,
    processor: VLMoEProcessor,
    server: Server,
    column: str,
    kind: Any,
    wrap: Callable[[Any], Any],
    options: dict[str, Any],
) -> None:
    entry = {"bytes": None, "path": server.url}
    rows = datasets.Dataset.from_dict({"number": [0, 1]})
    if column != "messages":
        plain = plain_chat("a", "b")
        rows = rows.add_column("messages", [plain] * 2, feature=datasets.Features(x=PLAIN)["x"])
    rows = rows.add_column(column, [wrap(entry)] * 2, feature=kind).remove_columns("number")
    write_parquet(rows, tmp_path / "train.parquet")
    try:
        loaded = load_rows(str(tmp_path / "train.parquet"), **options)
        VLMoECollator(processor)([loaded[0], loaded[len(loaded) - 1]])
    except (ValueError, FileNotFoundError):
        pass
    assert server.requests == []


def test_a_row_may_lack_its_single_picture(tmp_path: Path, png: bytes) -> None:
    question = {"role": "user", "content": [{"type": "text", "text": "what?"}]}
    rows = datasets.Dataset.from_dict(
        {"messages": [[QUESTION, ANSWER], [question, ANSWER], [QUESTION, ANSWER]]}
    )
    images = [{"bytes": png, "path": None}, None, {"bytes": png, "path": None}]
    rows = rows.add_column("image", images, feature=datasets.Image(decode=False))
    write_parquet(rows, tmp_path / "rows.parquet")
    loaded = load_rows(str(tmp_path / "rows.parquet"))
    assert loaded.features["images"] == UNDECODED
    assert [len(row["images"]) for row in loaded] == [1, 0, 1]
