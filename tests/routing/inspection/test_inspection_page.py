"""The page: self-contained, escaped, well formed, and with sentences that its numbers bear out."""

import base64
import io
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import PreTrainedTokenizerBase

from vlmoe.routing.inspection.analysis import DatasetRouting, change, specialization
from vlmoe.routing.inspection.images import ImageRouting, TileRouting
from vlmoe.routing.inspection.overlays import RANK_COLORS, layer_colors, ranks
from vlmoe.routing.inspection.page import page, percent, write_page
from vlmoe.routing.inspection.report import BeforeTraining, RoutingInspection, draw_figures, numbers
from vlmoe.routing.inspection.tokens import TracedPrompt, layer_strip, token_text, visible
from vlmoe.routing.trace import TokenRouting

ATTACK = '<script>alert("x")</script><img src=http://example.org/a.png onerror=alert(1)>'
VOID = {"meta", "link", "img", "br", "input"}


class Reader(HTMLParser):
    """What a page is made of; raises where its elements are not nested."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] != "style":
            self.text += data


def prompt(question: str = "what is it?", layers: int = 2, image: Path | None = None) -> Any:
    """Seven prompt tokens, of which four are an image's, and an answer of two tokens."""
    experts = torch.arange(layers * 8 * 2).view(layers, 8, 2) % 4
    experts[:, 1:5] = torch.tensor([3, 1])
    experts[:, 4] = torch.tensor([2, 0])
    is_image = torch.tensor([False, *[True] * 4, False, False, False])
    weights = torch.tensor([0.75, 0.25]).expand(layers, 8, 2)
    picture = np.zeros((8, 8, 3), dtype=np.uint8)
    cells = experts[:, 1:5, 0].view(layers, 2, 2).numpy()
    tile = TileRouting(picture, np.ones((8, 8), dtype=bool), (4, 4), cells)
    return TracedPrompt(
        question=question,
        answer="<b>bold</b>",
        routing=TokenRouting(
            tuple(range(layers)), 4, torch.arange(8), is_image.long(), experts, weights
        ),
        tokens=["<|user|>", *["<image>"] * 4, " what", "ever", " <b>", "<s>"],
        is_special=[True, *[True] * 4, False, False, False, True],
        answer_start=7,
        images=[ImageRouting([tile], 0, 0)] if image else [],
        image_figures=[image] if image else [],
        reference=ATTACK,
        question_type="<i>",
    )


def dataset(layers: int = 2, seed: int = 0) -> DatasetRouting:
    generator = np.random.default_rng(seed)
    counts = generator.integers(1, 20, (40, layers, 2, 4)).astype(np.int32)
    counts[::2, 0, 0, 3] += 60
    shares = counts.sum(0) / counts.sum((0, 3))[..., None]  # (L, 2, E)
    of_all = {kind: [0.5] * layers for kind in ("image", "text", "all")}
    load = {
        "fair_share": 0.25,
        "text_share": shares[:, 0].tolist(),
        "image_share": shares[:, 1].tolist(),
        "max_over_mean": [1.5] * layers,
        "tokens": {kind: [100] * layers for kind in of_all},
        "max_violation": {
            kind: (4 * shares[:, number].max(-1) - 1).tolist()
            for number, kind in enumerate(("text", "image"))
        }
        | {"all": [0.5] * layers},
        "load_entropy": of_all,
        "router_entropy": of_all,
        "dead_experts": {kind: [0] * layers for kind in of_all},
        "overlap": [0.625] * layers,
    }
    first = generator.integers(0, 4, (layers, 30)).astype(np.int16)
    kinds = ["shape", "<u>"] * 20
    image = np.arange(30) < 12
    return DatasetRouting(
        tuple(range(layers)), load, kinds, counts, first, np.arange(30), image.astype(int)
    )


@pytest.fixture
def inspection(tmp_path: Path) -> RoutingInspection:
    """Every part of the page, with markup wherever a text comes from outside."""
    picture = tmp_path / "image.png"
    Image.new("RGB", (30, 20), "red").save(picture)
    after, before = dataset(), dataset(seed=1)
    result = RoutingInspection(
        model=f"model {ATTACK}",
        layers=(0, 1),
        num_experts=4,
        top_k=2,
        prompts=[prompt(ATTACK, image=picture)],
        dataset=ATTACK,
        routing=after,
        types=specialization(after.counts, after.question_types),
        before=BeforeTraining(ATTACK, before, change(before, after)),
    )
    draw_figures(result, tmp_path)
    return result


def test_the_page_loads_nothing_and_escapes_every_text(
    inspection: RoutingInspection, tmp_path: Path
) -> None:
    text = write_page(inspection, tmp_path / "page.html").read_text(encoding="utf-8")
    reader = Reader(text)
    assert not {"script", "iframe", "object", "i", "u"} & set(reader.tags)
    assert reader.text.count(ATTACK) >= 5, "what was asked is shown as it is"
    loaded = [value for name, value in reader.attributes if name in ("src", "href")]
    assert len(loaded) == 1 + len(inspection.figures) + 1  # icon, figures, the image
    assert all((value or "").startswith("data:") for value in loaded)
    assert not any(name.startswith("on") for name, _ in reader.attributes)
    policies = [value for name, value in reader.attributes if name == "content"]
    assert any((value or "").startswith("default-src 'none'") for value in policies)
    assert "url(" not in text and "@import" not in text


def test_the_sentences_are_those_of_the_numbers(inspection: RoutingInspection) -> None:
    text = " ".join(Reader(page(inspection)).text.split())
    routing, types = inspection.routing, inspection.types
    assert routing is not None and types is not None and inspection.before is not None
    share = max(routing.load["text_share"][0])
    assert f"expert 3 gets {percent(share)} of what text tokens choose (even would be 25%)" in text
    assert "Image and text tokens have 62.5% of their load in common" in text
    assert "No expert is idle" in text and "layer 0 a text token's expert tells 0." in text
    assert "In layer 1 a text token's expert tells" in text and "no more than chance" in text
    comparison = inspection.before.change
    assert comparison is not None
    assert f"{percent(comparison['image']['changed'][1])} of the image tokens (by chance" in text
    assert "In layer 0 the 4 are spread over 2 experts, most at expert 3 (75%)." in text


def test_numbers_for_the_json_file_name_every_routed_token(inspection: RoutingInspection) -> None:
    data = numbers(inspection)
    tokens = data["prompts"][0]["tokens"]
    assert len(tokens) == 8 and tokens[1]["is_image"] and tokens[5]["text"] == " what"
    assert tokens[4]["experts"] == [[2, 0], [2, 0]]
    assert tokens[4]["weights"] == [[0.75, 0.25], [0.75, 0.25]]
    assert data["before"]["model"] == ATTACK and data["question_types"]["types"] == ["<u>", "shape"]


def test_an_image_is_one_box_and_the_unrouted_token_says_so() -> None:
    text = page(RoutingInspection("m", (0,), 4, 2, prompts=[prompt(layers=1)]))
    strip = text[text.index('<div class="strip">') : text.rindex("</section>")]
    reader = Reader(strip.removesuffix("</div>\n"))
    assert (
        strip.count("image (4 tokens)") == 1
        and "<b>3</b> &times;3 &middot; <b>2</b> &times;1" in strip
    )
    titles = [value for name, value in reader.attributes if name == "title"]
    assert titles[0] == "expert 0: 0.75, expert 1: 0.25"
    assert titles[1] == "expert 3: 3 tokens, expert 2: 1 tokens"
    assert "not routed" in (titles[-1] or "") and len(titles) == 6
    assert reader.text.index("answer:") < reader.text.index("<b>")
    classes = [value for name, value in reader.attributes if name == "class" and value]
    words = [value for value in classes if value.startswith("token")]
    assert words[2] == "token word" and words[3] == "token", "`ever` belongs to ` what`"


def test_deep_models_are_folded_and_missing_parts_left_out(tmp_path: Path) -> None:
    deep = RoutingInspection("m", tuple(range(24)), 4, 2, prompts=[prompt(layers=24)])
    text = page(deep)
    assert text.count('type="radio"') == 24 and "How the work is shared" not in text
    Reader(text)
    deep.routing = dataset(24)
    deep.types = specialization(deep.routing.counts, ["shape", "color"] * 20)
    draw_figures(deep, tmp_path)
    assert "Only the 6 layers" in page(deep)
    untyped = RoutingInspection("m", (0, 1), 4, 2, routing=dataset())
    draw_figures(untyped, tmp_path)
    assert "Left out: these data name no types of questions" in page(untyped)
    assert set(untyped.figures) == {"load"}


def large_prompt(layers: int, experts: int, side: int) -> TracedPrompt:
    """An image of `side` x `side` tokens and 120 words, 8 experts each."""
    generator, words = torch.Generator().manual_seed(side), 120
    kinds = torch.tensor([0] * 10 + [1] * side * side + [0] * words)
    scores = torch.randn(layers, len(kinds), experts, generator=generator)
    weights, chosen = scores.softmax(-1).topk(8, -1)
    cells = chosen[:, kinds == 1, 0].view(layers, side, side).numpy()
    picture = np.random.default_rng(0).integers(0, 256, (28 * side, 28 * side, 3), dtype=np.uint8)
    tile = TileRouting(picture, np.ones(picture.shape[:2], dtype=bool), (28, 28), cells)
    ids = torch.arange(len(kinds))
    return TracedPrompt(
        question="what is it?",
        answer="a cat",
        routing=TokenRouting(tuple(range(layers)), experts, ids, kinds, chosen, weights),
        tokens=[f" word{i}" for i in range(len(kinds) + 1)],
        is_special=[False] * (len(kinds) + 1),
        answer_start=len(kinds) - 20,
        images=[ImageRouting([tile], 0, 0)],
    )


def test_images_of_deep_models_have_their_files_beside_the_page(tmp_path: Path) -> None:
    deep = RoutingInspection.of_prompts("m", [large_prompt(8, 16, 2)])
    text = deep.save(tmp_path).read_text(encoding="utf-8")
    with Image.open(tmp_path / "question_1_image_1.png") as picture:
        assert picture.width > 8 and picture.format == "PNG"
    assert text.count("<svg") == 1 + 8, "the page shows one layer at a time"


@pytest.mark.slow
def test_48_layers_of_128_experts_fit_a_page_of_5_megabytes_with_one_layer_shown() -> None:
    prompts = [large_prompt(48, 128, 16) for _ in range(3)]
    seen = RoutingInspection.of_prompts("large", prompts)
    text = page(seen)
    assert len(text.encode()) < 5_000_000
    reader = Reader(text)
    assert "script" not in reader.tags and reader.tags.count("svg") == 3 * (1 + 48)
    checked = [name for name, _ in reader.attributes if name == "checked"]
    assert reader.tags.count("input") == 3 * 48 and len(checked) == 3
    sources = [value or "" for name, value in reader.attributes if name == "href"]
    assert all(source.startswith(("data:", "#q")) for source in sources)
    counts = np.bincount(prompts[0].routing.first_choices[5].numpy(), minlength=128)
    strip = layer_strip(prompts[0], 5, by_load=True)
    assert [count for _, count in strip.busiest] == sorted(counts)[::-1][:12]
    assert [strip.ranks[expert] for expert, _ in strip.busiest] == list(range(12))
    assert strip.ranks.count(12) == 128 - 12


def test_colors_over_an_image_are_the_ranks_of_its_cells() -> None:
    image = large_prompt(2, 128, 4).images[0]
    rank_of = ranks(image.tiles[0].experts[1].flatten().tolist(), 128)
    [placed] = layer_colors(image, 1, rank_of)
    assert (placed.left, placed.top, placed.width, placed.height) == (0, 0, 112, 112)
    drawn = Image.open(io.BytesIO(base64.b64decode(placed.uri.split(",")[1]))).convert("RGB")
    for (row, column), expert in np.ndenumerate(image.tiles[0].experts[1]):
        color = "#{:02X}{:02X}{:02X}".format(*drawn.getpixel((column, row)))
        assert color == RANK_COLORS[rank_of[expert]].upper()


def test_boxes_beyond_the_room_are_left_out_at_the_start() -> None:
    strip = layer_strip(large_prompt(1, 16, 2), 0, most=7)
    assert strip.left_out == 10 + 1 + 121 - 7 and strip.boxes[-1].place == 134
    assert layer_strip(large_prompt(1, 16, 2), 0, most=500).left_out == 0


def test_a_token_shows_whether_it_begins_a_word(tokenizer: PreTrainedTokenizerBase) -> None:
    ids = tokenizer("shape is", add_special_tokens=False)["input_ids"]
    texts = [token_text(tokenizer, token) for token in ids]
    assert "".join(texts) == " shape is"
    shown = [visible(text) for text in (" shape", "s", "\n", " ", "")]
    assert shown == ["shape", "s", "⏎", "␣", "(empty)"]
    assert [percent(x) for x in (0.125, 1.0, 0.0, 0.0004, None)] == [
        "12.5%",
        "100%",
        "0%",
        "0%",
        "\N{EN DASH}",
    ]


BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--hide-scrollbars", "--enable-logging=stderr", "--v=0"),
)


@pytest.mark.slow
def test_a_browser_shows_the_page_without_errors_or_requests(
    inspection: RoutingInspection, tmp_path: Path
) -> None:
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is installed")
    file = write_page(inspection, tmp_path / "page.html")
    log, screenshot = tmp_path / "net.json", tmp_path / "page.png"
    run: Callable[..., str] = lambda *more: _browse(browser, tmp_path, file, *more)  # noqa: E731
    dump = run("--dump-dom", f"--log-net-log={log}")
    assert "Token by token" in dump and "<script" not in dump
    assert "example.org" not in log.read_text(), "an address of the page was asked for"
    for width in (1280, 400):
        run(f"--screenshot={screenshot}", f"--window-size={width},4000")
        shown = np.asarray(Image.open(screenshot).convert("L"))
        assert shown.shape[0] == 4000 and 5 < shown.std(), "a blank picture"
        for part in np.array_split(shown[:2000], 4):
            assert part.min() < 100, "a stretch of the page without anything to read"


def _browse(browser: str, folder: Path, file: Path, *flags: str) -> str:
    profile = folder / "profile"
    shutil.rmtree(profile, ignore_errors=True)
    command = [browser, *FLAGS, f"--user-data-dir={profile}", *flags, file.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in done.stderr, done.stderr
    return done.stdout
