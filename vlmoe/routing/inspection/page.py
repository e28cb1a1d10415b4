# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""One HTML page that shows a model's routing to a person who never saw a router.

The page is self-contained: pictures are data URIs, there are no scripts, and its content security
policy forbids the browser to load anything. Every text from outside is escaped. Its sentences are
made from the numbers.
"""

import base64
import math
from collections import Counter
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from ...figures.plots import DOTS_PER_INCH
from ...figures.text import drawable
from ...hub.atomic_files import atomic_path
from .figures import expert_colors, text_color
from .report import LAYERS_IN_FULL, VISION_TOKENS, BeforeTraining, RoutingInspection
from .tokens import TracedPrompt, layer_strip, percent

STYLE = """
:root { color-scheme: light; --ink: #23262b; --soft: #5c6570; --line: #e3e5e8; }
* { box-sizing: border-box; }
body { margin: 0; background: #f7f8f9; color: var(--ink); line-height: 1.55;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { font-size: 30px; line-height: 1.2; margin: 0 0 6px; }
h2 { font-size: 22px; margin: 0 0 8px; }
h3 { font-size: 17px; margin: 22px 0 4px; }
p { margin: 8px 0; max-width: 800px; }
section { background: #fff; border: 1px solid var(--line); border-radius: 10px;
  padding: 22px 26px; margin: 20px 0; }
.soft, figcaption { color: var(--soft); }
.facts { display: flex; flex-wrap: wrap; gap: 8px; padding: 0; margin: 14px 0 0; list-style: none; }
.facts li { background: #fff; border: 1px solid var(--line); border-radius: 16px;
  padding: 3px 12px; }
figure { margin: 14px 0; }
.scroll { overflow-x: auto; }
img { display: block; max-width: 100%; height: auto; }
figcaption { font-size: 15px; max-width: 800px; margin-top: 6px; }
table { border-collapse: collapse; font-size: 15px; font-variant-numeric: tabular-nums; }
th, td { padding: 6px 14px 6px 0; text-align: left; border-bottom: 1px solid var(--line);
  vertical-align: top; }
th { font-weight: 600; min-width: 74px; max-width: 130px; vertical-align: bottom; }
td { white-space: nowrap; }
dl { margin: 14px 0 0; max-width: 860px; font-size: 15px; display: grid;
  grid-template-columns: max-content 1fr; gap: 4px 16px; }
dt { font-weight: 600; } dd { margin: 0; }
.legend { display: flex; flex-wrap: wrap; gap: 5px; margin: 10px 0; align-items: center; }
.legend b { font-weight: 600; border-radius: 5px; padding: 1px 9px; font-size: 14px; }
.ask { background: #f1f5fa; border-radius: 10px; padding: 10px 16px; margin: 12px 0; }
.ask b { font-weight: 600; }
.strip { display: flex; flex-wrap: wrap; row-gap: 8px; margin: 8px 0 4px -7px; }
.token { display: inline-flex; flex-direction: column; align-items: center; border-radius: 5px;
  padding: 2px 7px 3px; margin-right: 2px; white-space: pre; line-height: 1.3; }
.token.word { margin-left: 7px; }
.token small { font-size: 12px; font-variant-numeric: tabular-nums; }
.token.special > span { font-family: ui-monospace, "Liberation Mono", monospace; font-size: 13px;
  line-height: 21px; }
.token.unrouted { background: #fff; border: 1.5px dashed #9aa1a9; color: var(--soft); }
.token.image { color: #000; padding: 2px 10px 3px; }
.token.image span, .token.image small { background: rgba(255,255,255,.88); padding: 0 8px; }
.token.image span { border-radius: 4px 4px 0 0; } .token.image small { border-radius: 0 0 4px 4px;
  align-self: stretch; text-align: center; }
.answer { align-self: center; margin: 0 8px 0 14px; color: var(--soft); }
details { margin: 8px 0; } summary { cursor: pointer; color: #1f5fa8; }
.prompt + .prompt { border-top: 1px solid var(--line); margin-top: 26px; padding-top: 18px; }
ul.plain { padding-left: 20px; max-width: 800px; } ul.plain li { margin: 5px 0; }
@media (max-width: 640px) {
  main { padding: 16px 8px 40px; } section { padding: 16px 14px; } h1 { font-size: 25px; }
  dl { grid-template-columns: 1fr; gap: 0; } dd { margin: 0 0 8px; }
  .scroll img { max-width: none; }
}
"""


def write_page(inspection: RoutingInspection, path: str | Path) -> Path:
    """Write the page, atomically, and return its path."""
    with atomic_path(path) as temporary:
        temporary.write_text(page(inspection), encoding="utf-8")
    return Path(path)


def page(inspection: RoutingInspection) -> str:
    """The HTML of the page."""
    sections = [_introduction(inspection)]
    if inspection.prompts:
        sections.append(_prompts(inspection))
    if inspection.routing is not None:
        sections += [_load(inspection), _types(inspection)]
    if inspection.before is not None:
        sections.append(_before(inspection, inspection.before))
    body = "\n".join(f"<section>\n{section}\n</section>" for section in sections)
    title = f"Routing of {escape(inspection.model)}"
    facts = [
        f"{len(inspection.layers)} layer{_s(inspection.layers)} with experts",
        f"{inspection.num_experts} experts in each",
        f"every token goes to {inspection.top_k}",
    ]
    if inspection.routing is not None:
        tokens = len(inspection.routing.token_ids)
        facts.append(escape(inspection.dataset or ""))
        facts.append(f"{len(inspection.routing.question_types):,} questions, {tokens:,} tokens")
    listed = "".join(f"<li>{fact}</li>" for fact in facts)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" \
content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
<h1>{title}</h1>
<p class="soft">Which expert looks at what: every token's way through the model's sparse layers.</p>
<ul class="facts">{listed}</ul>
{body}
</main>
</body>
</html>
"""


def _introduction(inspection: RoutingInspection) -> str:
    experts, k = inspection.num_experts, inspection.top_k
    return f"""<h2>What you are looking at</h2>
<p>The model reads a picture and a text as a row of <b>tokens</b>: pieces of words, and squares of
the picture. In each sparse layer a small part of the model, the <b>router</b>, looks at every token
and sends it to {k} of the layer's {experts} <b>experts</b>, which are small networks of their own.
The rest stay idle for that token. Nobody tells an expert what to be good at: what it does is
learned, and this page shows how the work is shared.</p>
<p>The expert with the most weight is a token's <b>first expert</b>. Experts and layers are counted
from 0; expert 0 of one layer has nothing to do with expert 0 of another.</p>"""


def _prompts(inspection: RoutingInspection) -> str:
    cards = [_prompt(inspection, prompt) for prompt in inspection.prompts]
    return (
        "<h2>Token by token</h2>\n<p>Each box is a token, coloured by its first expert. Below it "
        "stand the experts that it went to, the first one bold, with their weights where there is "
        "room; hover over a box for all of them. A gap between boxes is a gap between words; "
        "typewriter letters are marks of the chat format.</p>\n" + "\n".join(cards)
    )


def _prompt(inspection: RoutingInspection, prompt: TracedPrompt) -> str:
    truth = ""
    if prompt.reference is not None:
        truth = f' <span class="soft">(the data say: {escape(prompt.reference)})</span>'
    kind = f' <span class="soft">[{escape(prompt.question_type)}]</span>'
    parts = [
        '<div class="prompt">',
        f'<div class="ask">Question{kind if prompt.question_type else ""}: '
        f"<b>{escape(prompt.question)}</b><br>Answer: "
        f"<b>{escape(prompt.answer) or '(nothing)'}</b>{truth}</div>",
        *(_image_figure(inspection, prompt, number) for number in range(len(prompt.images))),
        _legend(inspection.num_experts),
    ]
    for number, layer in enumerate(inspection.layers):
        strip = layer_strip(prompt, number)
        if number < LAYERS_IN_FULL or number == len(inspection.layers) - 1:
            parts.append(f"<h3>Layer {layer}</h3>\n{strip}")
        else:
            parts.append(f"<details><summary>Layer {layer}</summary>\n{strip}</details>")
    return "\n".join([*parts, "</div>"])


def _image_figure(inspection: RoutingInspection, prompt: TracedPrompt, number: int) -> str:
    image, path = prompt.images[number], prompt.image_figures[number]
    tile = image.tiles[0]
    height, width = tile.cell_size
    text = (
        f"Each square is one image token: {width} x {height} pixels of the picture as the model "
        "sees it, in the colour and with the number of its first expert; below the colours the "
        "picture is grey."
    )
    if image.rows:
        text += (
            f" The processor cut this image into {image.rows} x {image.cols} tiles; the whole, "
            "made small, is below them."
        )
    if not all(tile.is_real.all() for tile in image.tiles):
        text += " Light grey in the bare picture is padding, whose tokens are routed too."
    for position, layer in enumerate(inspection.layers[:LAYERS_IN_FULL]):
        cells = [int(expert) for tile in image.tiles for expert in tile.experts[position].flatten()]
        busiest, count = Counter(cells).most_common(1)[0]
        text += f" In layer {layer} "
        if count == len(cells):
            text += f"all {count} go first to expert {busiest}."
        else:
            text += (
                f"the {len(cells)} are spread over {len(set(cells))} experts, most at expert "
                f"{busiest} ({percent(count / len(cells))})."
            )
    return _figure(path, text, "experts over the image")


def _load(inspection: RoutingInspection) -> str:
    assert inspection.routing is not None
    load, layers = inspection.routing.load, inspection.layers
    shown = inspection.shown_layers(load["max_over_mean"])
    items = []
    for number in shown:
        busy = []
        for kind in ("image", "text"):
            shares, violation = load[f"{kind}_share"][number], load["max_violation"][kind][number]
            if violation is not None:
                expert, largest = shares.index(max(shares)), max(shares)
                busy.append(
                    f"expert {expert} gets {percent(largest)} of what {kind} tokens choose "
                    f"(even would be {percent(largest / (violation + 1))})"
                )
        told = f"In layer {layers[number]} {' and '.join(busy)}."
        overlap = load["overlap"][number]
        if overlap is not None:
            told += f" Image and text tokens have {percent(overlap)} of their load in common."
        items.append(told)
    dead = sum(load["dead_experts"]["all"])
    items.append(
        "No expert is idle: each gets at least a tenth of its fair share in every layer."
        if not dead
        else f"{dead} expert{'s get' if dead > 1 else ' gets'} less than a tenth of a fair share: "
        "such experts are called dead, as they take memory and learn next to nothing."
    )
    caption = (
        "A row is a layer, a column an expert. White is an even share, red more, blue less. "
        "Where the two panels differ, pictures and words use different experts."
    )
    return f"""<h2>How the work is shared</h2>
{_figure(inspection.figures["load"], caption, "share of each expert, by layer")}
{_list(items)}
{_load_table(inspection)}
{_vision_load(inspection)}"""


def _vision_load(inspection: RoutingInspection) -> str:
    """The experts of vision tower and connector, where there are any."""
    assert inspection.routing is not None
    parts = []
    for place, load in inspection.routing.load.get("vision", {}).items():
        tokens = VISION_TOKENS[place]
        shares, violations = load["image_share"], load["max_violation"]["image"]
        told = [
            f"In layer {layer} expert {of_layer.index(max(of_layer))} gets "
            f"{percent(max(of_layer))} of what {tokens} choose (even would be "
            f"{percent(max(of_layer) / (violation + 1))})."
            for layer, of_layer, violation in zip(load["layers"], shares, violations, strict=True)
            if violation is not None
        ]
        caption = (
            f"The {place} has experts, too: every one of its {tokens} is sent to some of them."
        )
        figure = inspection.figures[f"load_{place}"]
        alternative = f"share of each expert of the {place}, by layer"
        parts.append(_figure(figure, caption, alternative) + _list(told))
    return "".join(parts)


def _load_table(inspection: RoutingInspection) -> str:
    assert inspection.routing is not None
    load = inspection.routing.load
    rows = [
        [
            str(layer),
            _times(load["max_violation"]["image"][number]),
            _times(load["max_violation"]["text"][number]),
            str(load["dead_experts"]["all"][number]),
            _number(load["load_entropy"]["all"][number]),
            _number(load["router_entropy"]["all"][number]),
            percent(load["overlap"][number]),
        ]
        for number, layer in enumerate(inspection.layers)
    ]
    head = ["layer", "busiest / mean, image tokens", "busiest / mean, text tokens", "dead experts"]
    head += ["load entropy", "router entropy", "overlap"]
    even = _number(math.log(inspection.num_experts))
    meanings = {
        "busiest / mean": "the load of the busiest expert over an even share. 1 is even; "
        f"{inspection.num_experts / inspection.top_k:.3g} is all tokens at the same experts.",
        "dead experts": "those with less than a tenth of a fair share.",
        "load entropy": f"how evenly the load is spread, in nats: {even} is even, less is uneven.",
        "router entropy": "how undecided the router is about a single token, in nats: 0 is "
        f"certain, {even} is no preference at all.",
        "overlap": "what part of their load image and text tokens have in common: 100% if they use "
        "the experts alike, 0% if they share none.",
    }
    told = "".join(f"<dt>{name}</dt><dd>{meaning}</dd>" for name, meaning in meanings.items())
    return f'{_table(head, rows)}\n<dl class="soft">{told}</dl>'


def _types(inspection: RoutingInspection) -> str:
    head = "<h2>Does an expert belong to a type of question?</h2>\n"
    types = inspection.types
    if types is None:
        return (
            f"{head}<p>Left out: these data name no types of questions, or only one (the column "
            "<code>question_type</code>).</p>"
        )
    labels = drawable(types["types"])
    counted = ", ".join(
        f"{escape(kind if label == kind else f'{label} {kind}')} ({count:,})"
        for label, kind, count in zip(labels, types["types"], types["questions"], strict=True)
    )
    caption = (
        "A row is a type of question, a column an expert; a panel is a layer. If the rows of a "
        "panel look alike, its experts do not care for the type. Text tokens, of question and "
        "answer."
    )
    if len(inspection.layers) > LAYERS_IN_FULL:
        caption += f" Only the {LAYERS_IN_FULL} layers where the expert tells most of the type."
    parts = [
        f"{head}<p>Types in the data, with the number of questions: {counted}.</p>",
        _figure(inspection.figures["types_text"], caption, "text tokens of each question type"),
    ]
    if "types_image" in inspection.figures:
        parts.append(_figure(inspection.figures["types_image"], "The same of image tokens.", ""))
    measure = (
        "How much a token's expert tells of the type of its question. 0 bits is nothing; "
        f"{types['type_entropy_bits']:.2f} bits would be everything. The black line is the "
        "control: the types were dealt out to the questions at random, and 95% of such shuffles "
        "stay below it. Only what rises above the line is more than chance."
    )
    parts.append(_figure(inspection.figures["information"], measure, "specialisation by layer"))
    parts.append(_list([*_type_sentences(inspection, types), _image_sentence(inspection, types)]))
    parts.append(
        '<p class="soft">Questions of one type are worded alike, and a router that looks at words '
        "alone shows up here as well: this tells that experts and types go together, not why.</p>"
    )
    return "\n".join(parts)


def _type_sentences(inspection: RoutingInspection, types: dict[str, Any]) -> list[str]:
    text = types["text"]
    items = []
    for number in inspection.shown_layers(text["information_bits"]):
        bits, shuffled = (
            _bits(text[key][number]) for key in ("information_bits", "shuffled_mean_bits")
        )
        told = (
            f"In layer {inspection.layers[number]} a text token's expert tells {bits} of its "
            f"question's type; shuffled types give {shuffled}. "
        )
        strongest = text["strongest"][number]
        if not text["is_above_chance"][number]:
            told += "That is no more than chance."
        elif strongest:
            told += (
                f"Most striking: expert {strongest['expert']} gets {percent(strongest['share'])} "
                f"of what the text tokens of &ldquo;{escape(strongest['type'])}&rdquo; questions "
                f"choose, and {percent(strongest['average'])} over all questions."
            )
        items.append(told)
    return items


def _image_sentence(inspection: RoutingInspection, types: dict[str, Any]) -> str:
    pairs = zip(inspection.layers, types["image"]["is_above_chance"], strict=True)
    above = [layer for layer, is_above in pairs if is_above]
    if above:
        return f"Image tokens rise above chance in layer{_s(above)} {', '.join(map(str, above))}."
    return (
        "Image tokens show no more than chance. Where the picture stands before the question it "
        "cannot be otherwise: a token knows only what comes before it."
    )


def _before(inspection: RoutingInspection, before: BeforeTraining) -> str:
    assert inspection.routing is not None
    caption = "Above before, below after, on one scale. White is an even share."
    return f"""<h2>Before and after training</h2>
<p>Before: {escape(before.name)}. After: {escape(inspection.model)}. The same questions.</p>
{_figure(inspection.figures["before"], caption, "load before and after")}
{_before_table(inspection, before.routing.load, inspection.routing.load)}
{_list(_before_sentences(inspection, before))}"""


def _before_table(inspection: RoutingInspection, old: dict[str, Any], new: dict[str, Any]) -> str:
    values = (
        (_times, old["max_violation"]["all"], new["max_violation"]["all"]),
        (str, old["dead_experts"]["all"], new["dead_experts"]["all"]),
        (percent, old["overlap"], new["overlap"]),
    )
    rows = [
        [str(layer), *(f"{form(a[number])} &rarr; {form(b[number])}" for form, a, b in values)]
        for number, layer in enumerate(inspection.layers)
    ]
    return _table(["layer", "busiest / mean", "dead experts", "overlap"], rows)


def _before_sentences(inspection: RoutingInspection, before: BeforeTraining) -> list[str]:
    if before.change is None:
        return [
            "The two models turn the questions into different tokens, so single tokens cannot be "
            "compared."
        ]
    items = []
    for number in inspection.shown_layers(before.change["all"]["changed"]):
        told = [
            f"{percent(values['changed'][number])} of the {kind} tokens (by chance "
            f"{percent(values['by_chance'][number])})"
            for kind in ("image", "text")
            if (values := before.change[kind])
        ]
        items.append(
            f"In layer {inspection.layers[number]} training gave another first expert to "
            f"{' and '.join(told)}."
        )
    items.append(
        "&ldquo;By chance&rdquo; is what would differ if the two choices had nothing to do with "
        "each other. The comparison makes sense where the one model was trained from the other: "
        "else expert 0 of the one is a stranger to expert 0 of the other."
    )
    return items


def _legend(experts: int) -> str:
    chips = "".join(
        f'<b style="background:{color};color:{text_color(color)}">{expert}</b>'
        for expert, color in enumerate(expert_colors(experts))
    )
    return f'<div class="legend"><span class="soft">experts</span>{chips}</div>'


def _figure(path: Path, caption: str, alternative: str) -> str:
    data = base64.b64encode(Path(path).read_bytes()).decode()
    with Image.open(path) as picture:
        width = round(picture.width * 96 / DOTS_PER_INCH)
    return (
        f'<figure><div class="scroll"><img src="data:image/png;base64,{data}" width="{width}" '
        f'alt="{escape(alternative)}"></div><figcaption>{caption}</figcaption></figure>'
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells are HTML."""
    top = "".join(f"<th>{name}</th>" for name in head)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{top}</tr>{body}</table></div>'


def _list(items: Sequence[str]) -> str:
    return f'<ul class="plain">{"".join(f"<li>{item}</li>" for item in items)}</ul>'


def _times(max_violation: float | None) -> str:
    """The busiest expert's load over the mean, from `max_violation`."""
    return "&ndash;" if max_violation is None else f"{max_violation + 1:.2f}"


def _bits(value: float) -> str:
    return f"{value:.3f} bits" if value >= 0.001 else "less than 0.001 bits"


def _number(value: float | None) -> str:
    return "&ndash;" if value is None else f"{value:.2f}"


def _s(items: Sequence[Any]) -> str:
    return "" if len(items) == 1 else "s"
