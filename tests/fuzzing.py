"""Damaged inputs of the commands, each made again from its kind and number.

`folder`: a saved model with a file that is broken, changed or gone; `options`: options of a command
with values that nobody should give; `data`: a dataset file with broken bytes or rows.
"""

import json
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

JSON_FILES = ("config.json", "processor_config.json", "tokenizer_config.json", "tokenizer.json")
WEIGHTS = "model.safetensors"
# A change of one of these shows in the shapes of the weights, or is out of every range.
SIZES = {
    "text_config": ("hidden_size", "num_hidden_layers", "num_experts", "moe_intermediate_size"),
    "vision_config": ("hidden_size", "num_hidden_layers", "intermediate_size", "patch_size"),
}
# Another kind of value in one of these, but null, is against the schema.
TYPED = {
    "config.json": ("architectures", "auto_map", "model_type", "transformers_version"),
    "processor_config.json": (
        *("auto_map", "global_image_token", "image_end_token", "image_processor", "image_seq_len"),
        *("image_start_token", "image_token", "processor_class", "tile_layout"),
    ),
    "tokenizer_config.json": (
        *("clean_up_tokenization_spaces", "model_input_names", "processor_class"),
        *("tokenizer_class", "padding_side"),
    ),
}
VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 7, 2**40, -(2**40), 0.5, -0.5, 1e300, "", "red", "\ud800"),
    *([], [1], [[]], {}, {"a": 1}, "x" * 500, "\x00", "../../x"),
]
HANG_SECONDS = 30


@dataclass
class Case:
    """A damaged input.

    Attributes:
        damage: what was done to it.
        visible: a schema, header, shape, range or finiteness check can see it: it must be refused.
        argv: the command.
    """

    damage: str
    visible: bool
    argv: list[str]


@dataclass
class Figures:
    """How the cases of a kind ended; `faults` and those that ran (`harmless`) by number."""

    inputs: int = 0
    refused: int = 0
    ran: int = 0
    crashed: int = 0
    hung: int = 0
    faults: list[str] = field(default_factory=list)
    harmless: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        """One line for a report."""
        return (
            f"{self.inputs} inputs: {self.refused} refused, {self.ran} ran, {self.crashed} crashed,"
            f" {self.hung} hung"
        )


class Hang(BaseException):
    """Past the time limit; no `except Exception` takes it for a fault of the input."""


@contextmanager
def time_limit(seconds: float = HANG_SECONDS) -> Iterator[None]:
    """Raise `Hang` in the block after so many seconds."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def judge(
    figures: Figures,
    name: str,
    case: Case,
    run: Callable[[], tuple[int, str]],
    seconds: float = HANG_SECONDS,
) -> None:
    """Run a case and enter how it ended.

    Args:
        figures: where it is entered.
        name: of the case.
        case: what was done.
        run: gives the exit code and what went to stderr; raises what escapes the command.
        seconds: after them it hangs.
    """
    figures.inputs += 1
    try:
        with time_limit(seconds):
            code, errors = run()
    except Hang:
        figures.hung += 1
        figures.faults.append(f"{name} hangs: {case.damage}")
        return
    except Exception as error:
        figures.crashed += 1
        figures.faults.append(f"{name} crashes with {error!r:.200}: {case.damage}")
        return
    last = errors.strip().splitlines()[-1:] or [""]
    if code == 0:
        figures.ran += 1
        figures.harmless.append(f"{name}: {case.damage}")
        if case.visible:
            figures.faults.append(f"{name} runs: {case.damage}")
    elif code != 2 or "Traceback" in errors or ": error: " not in last[0]:
        figures.crashed += 1
        figures.faults.append(f"{name} ends with {code}, {errors[-300:]!r}: {case.damage}")
    else:
        figures.refused += 1


def folder_case(number: int, model: Path, work: Path) -> Case:
    """A copy of the model in `work`, damaged."""
    draw = random.Random(f"folder {number}")
    folder = shutil.copytree(model, work / "model")
    damage, visible = draw.choices(FOLDER_DAMAGES, weights=[6, 3, 3, 5, 2, 1])[0](draw, folder)
    argv = ["generate", "--model", str(folder), "--max_new_tokens", "1", "--device", "cpu", "red?"]
    return Case(damage, visible, argv)


def _json_value(draw: random.Random, folder: Path) -> tuple[str, bool]:
    """Another value somewhere in a JSON file."""
    name = draw.choice(JSON_FILES[:3])
    content = json.loads((folder / name).read_text())
    parent, path = content, []
    while True:
        key = draw.choice(sorted(parent))
        path.append(key)
        if not (isinstance(parent[key], dict) and parent[key]) or draw.random() < 0.2:
            break
        parent = parent[key]
    old, new = parent[path[-1]], draw.choice(VALUES)
    parent[path[-1]] = new
    (folder / name).write_text(json.dumps(content))
    is_size = len(path) == 2 and path[1] in SIZES.get(path[0], ()) and name == "config.json"
    is_part = name == "config.json" and path in (["text_config"], ["vision_config"])
    is_other = new is not None and type(new) is not type(old)
    is_typed = len(path) == 1 and path[0] in TYPED[name] and is_other
    visible = is_size and new != old
    return f"{name}: {'.'.join(path)} {old!r:.40} -> {new!r:.40}", visible or is_part or is_typed


def _json_size(draw: random.Random, folder: Path) -> tuple[str, bool]:
    """Another size in the config, or none."""
    file = folder / "config.json"
    content = json.loads(file.read_text())
    part = draw.choice(sorted(SIZES))
    name = draw.choice(SIZES[part])
    old = content[part][name]
    new = draw.choice([old + 1, old * 2, 0, -old, str(old), [old], old + 0.5, float(10**18)])
    content[part][name] = new
    file.write_text(json.dumps(content))
    return f"config.json: {part}.{name} {old!r} -> {new!r}", True


def _json_text(draw: random.Random, folder: Path) -> tuple[str, bool]:
    """A JSON file whose text is broken, or whose top level is another."""
    name = draw.choice(JSON_FILES)
    file = folder / name
    text = file.read_text()
    damages = {
        "cut": text[: draw.randrange(1, len(text) - 2)],
        "empty": "",
        "a list": f"[{text}]",
        "a number": "5",
        "null": "null",
        "a text": '"red"',
        "NaN": f'{{"x": NaN, {text.strip()[1:]}',
        "deep": f'{{"x": {"[" * 100_000}{"]" * 100_000}, {text.strip()[1:]}',
        "twice": text + text,
    }
    damage = draw.choice([*damages, "bytes"])
    if damage == "bytes":
        at = draw.randrange(len(text))
        file.write_bytes(text[:at].encode() + b"\xff\xfe" + text[at:].encode())
    else:
        file.write_text(damages[damage])
    return f"{name}: {damage}", True


def _weights(draw: random.Random, folder: Path) -> tuple[str, bool]:
    """Tensors that are gone, renamed, of another shape or type, or not finite."""
    file = folder / WEIGHTS
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    name = draw.choice(sorted(tensors))
    damage = draw.choice(["drop", "rename", "reshape", "nan", "inf", "int", "huge", "extra"])
    tensor = tensors[name]
    if damage == "drop":
        del tensors[name]
    elif damage == "rename":
        tensors[name + "_"] = tensors.pop(name)
    elif damage == "reshape":
        tensors[name] = torch.cat([tensor, tensor])
    elif damage in ("nan", "inf"):
        tensor.view(-1)[draw.randrange(tensor.numel())] = float(damage)
    elif damage == "int":
        tensors[name] = tensor.to(torch.int32)
    elif damage == "huge":
        tensor.view(-1)[draw.randrange(tensor.numel())] = 1e30
    else:
        tensors["red"] = tensor.clone()
    save_file(tensors, file, metadata)
    return f"{WEIGHTS}: {damage} {name}", damage != "huge"


def _weights_bytes(draw: random.Random, folder: Path) -> tuple[str, bool]:
    """A safetensors file with broken bytes."""
    file = folder / WEIGHTS
    content = bytearray(file.read_bytes())
    length = int.from_bytes(content[:8], "little")
    damages: dict[str, bytes] = {
        "cut": bytes(content[: draw.randrange(len(content))]),
        "length": (2 ** draw.randrange(64)).to_bytes(8, "little") + bytes(content[8:]),
        "header": bytes(content[:8]) + draw.randbytes(length) + bytes(content[8 + length :]),
        "more": bytes(content) + b"\x00" * draw.randrange(1, 99),
        "random": draw.randbytes(999),
    }
    damage = draw.choice(sorted(damages))
    file.write_bytes(damages[damage])
    return f"{WEIGHTS}: {damage}", True


def _files(draw: random.Random, folder: Path) -> tuple[str, bool]:
    """A file that is gone, a folder or a dangling link, or a template that does not render."""
    templates = ("{% for", "{{ 1 / 0 }}", "{{ messages.x.y }}", "", "{{ raise_exception('red') }}")
    name = draw.choice([*JSON_FILES, WEIGHTS, "chat_template.jinja", "generation_config.json"])
    file = folder / name
    if name == "chat_template.jinja":
        template = draw.choice(templates)
        file.write_text(template)
        return f"{name}: {template!r}", False
    file.unlink()
    damage = draw.choice(["gone", "folder", "link"])
    if damage == "folder":
        file.mkdir()
    elif damage == "link":
        file.symlink_to(folder / "nowhere")
    return f"{name}: {damage}", name != "generation_config.json"


FOLDER_DAMAGES = (_json_value, _json_size, _json_text, _weights, _weights_bytes, _files)

COUNTS = ["0", "-1", "1.5", "nan", "", "red", "é", "[1]", "99999999999999999999x"]
SHARES = ["-1", "nan", "inf", "red", "", "1e400"]
OBJECTS = ["{", "5", "[]", "null", '{"a": NaN}', '{"num_layers": 5}', '{"text_config": 5}']
OBJECTS += ['{"text_config": {"num_experts": "four"}}', '{"vision_config": {"num_layers": 5}}']
OBJECTS += ['{"vision_config": {"patch_size": 0}}', "[" * 10**5, '{"vision_config": "red"}']
PATHS = ["/nowhere", "../nowhere", "", "nowhere", "\x00", "é" * 300, "/dev/null", "~nobody/x"]
NAMES = ["red", "", "é", "5", "../x"]
# options of each command, with values that each must be refused
BAD: dict[str, dict[str, list[str]]] = {
    "generate": {
        "max_new_tokens": COUNTS,
        "temperature": [*SHARES, "1e-40", "1e30"],
        "seed": ["-1", "red", "1.5", "99999999999999999999"],
        "image": PATHS,
        "model": PATHS,
        "device": ["red", "cuda:77"],
        "dtype": ["red", "int8", "float33"],
        "attn_implementation": ["red", "é"],
        "experts_implementation": ["red", "é"],
        "config": PATHS,
        "rde": ["1"],
    },
    "evaluate": {
        "batch_size": COUNTS,
        "max_rows": COUNTS,
        "max_new_tokens": COUNTS,
        "max_length": COUNTS,
        "split": NAMES,
        "dataset": PATHS,
        "without_images": ["red", "5"],
        "max_image_pixels": ["0", "red"],
    },
    "inspect": {"max_rows": COUNTS, "batch_size": COUNTS, "split": NAMES, "before": PATHS},
    "train": {
        "learning_rate": [*SHARES, "0"],
        "num_train_epochs": [*SHARES, "0"],
        "max_steps": ["0", "-7", "red", "1.5"],
        "per_device_train_batch_size": COUNTS,
        "gradient_accumulation_steps": COUNTS,
        "seed": ["-1", "red"],
        "weight_decay": SHARES,
        "warmup_steps": ["-1", "nan", "red"],
        "optim": NAMES,
        "lr_scheduler_type": NAMES,
        "report_to": ["wandb", "red"],
        "model": PATHS,
        "model_overrides": OBJECTS,
        "model.text_config.num_experts": ["0", "-1", "1.5", "NaN", "", "red", "[1]", "null"],
        "model.num_layers": ["5"],
        "model.text_config": ["5", "{", ""],
        "max_train_rows": COUNTS,
        "altered_copies": ["-1", "red"],
        "lora_r": ["0", "7", "red"],
        "on_long_rows": NAMES,
        "logging_steps": ["0", "-1", "nan"],
        "resume_from_checkpoint": ["/nowhere", "nowhere"],
        "eval_split": NAMES,
        "save_strategy": NAMES,
    },
    "upcycle": {
        "num_experts": COUNTS,
        "num_experts_per_tok": COUNTS,
        "expert_init": NAMES,
        "sparse_layers": NAMES[:3],
        "fields": OBJECTS[:6],
        "fields.num_layers": ["5"],
        "fields.router_aux_loss_coef": ["-1", "red", "NaN"],
        "connector": OBJECTS[:6],
        "router_std": ["-1", "nan", "red"],
        "max_shard_size": ["red"],
    },
    "merge": {"model": PATHS, "config": PATHS},
    "card": {"config": PATHS, "rde": ["1"]},
}


def options_case(number: int, model: Path, data: Path, work: Path) -> Case:
    """A command with one bad value, and at times a second."""
    draw = random.Random(f"options {number}")
    command = draw.choice(sorted(BAD))
    base: dict[str, list[str]] = {
        "generate": ["--model", str(model), "--device", "cpu", "--max_new_tokens", "1", "red?"],
        "evaluate": ["--model", str(model), "--dataset", str(data), "--output", f"{work}/r.json"],
        "inspect": ["--model", str(model), "--dataset", str(data), "--output_dir", f"{work}/i"],
        "train": [
            *("--model", str(model), "--dataset", str(data), "--output_dir", f"{work}/o"),
            *("--use_cpu", "--report_to", "none", "--max_train_rows", "1", "--max_steps", "1"),
        ],
        "upcycle": [str(model), "--output_dir", f"{work}/u"],
        "merge": [str(model), "--output_dir", f"{work}/m"],
        "card": [str(model), "--output", f"{work}/c"],
    }
    names = draw.sample(
        sorted(BAD[command]), draw.choice([1, 1, 2]) if len(BAD[command]) > 1 else 1
    )
    bad = [f"--{name}={draw.choice(BAD[command][name])}" for name in names]
    return Case(f"{command} {bad!r:.200}", True, [command, *base[command], *bad])


def data_case(number: int, image: bytes, work: Path) -> Case:
    """A file `train.jsonl` of two rows with a picture each, damaged."""
    draw = random.Random(f"data {number}")
    (work / "a.png").write_bytes(image)
    rows = [_row("is it red?", "yes"), _row("what shape?", "a circle")]
    file = work / "train.jsonl"
    damage, visible = draw.choices(DATA_DAMAGES, weights=[4, 2, 2])[0](draw, rows, file)
    return Case(damage, visible, [str(file)])


def _row(question: str, answer: str) -> dict[str, Any]:
    parts = [{"type": "image"}, {"type": "text", "text": question}]
    return {
        "messages": [
            {"role": "user", "content": parts},
            {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        ],
        "images": ["a.png"],
    }


def _write(file: Path, rows: list[Any]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _row_damage(draw: random.Random, rows: list[Any], file: Path) -> tuple[str, bool]:
    """A part of the second row is another value or gone."""
    damages: dict[str, Callable[[dict[str, Any]], Any]] = {
        "no messages": lambda row: row.pop("messages"),
        "no images": lambda row: row.pop("images"),
        "messages is a text": lambda row: row.update(messages="red"),
        "messages is empty": lambda row: row.update(messages=[]),
        "messages is null": lambda row: row.update(messages=None),
        "a message is a number": lambda row: row["messages"].insert(0, 5),
        "an unknown role": lambda row: row["messages"][0].update(role="red"),
        "no role": lambda row: row["messages"][0].pop("role"),
        "a role of another type": lambda row: row["messages"][0].update(role=5),
        "no content": lambda row: row["messages"][0].pop("content"),
        "content is a number": lambda row: row["messages"][0].update(content=5),
        "an unknown part": lambda row: row["messages"][0]["content"][0].update(type="red"),
        "a part of another type": lambda row: row["messages"][0]["content"].insert(0, [5]),
        "two image parts": lambda row: row["messages"][0]["content"].insert(0, {"type": "image"}),
        "two images": lambda row: row.update(images=["a.png", "a.png"]),
        "no answer": lambda row: row["messages"].pop(),
        "an answer first": lambda row: row["messages"].reverse(),
        "an image that is not there": lambda row: row.update(images=["b.png"]),
        "an image outside": lambda row: row.update(images=["../a.png"]),
        "an image of the network": lambda row: row.update(images=["http://127.0.0.1:9/a.png"]),
        "an image that is a folder": lambda row: row.update(images=["."]),
        "an image that is a number": lambda row: row.update(images=[5]),
        "an image that is base64 of nothing": lambda row: row.update(images=["aGk=" * 99]),
        "a misspelled column": lambda row: row.update(mesages=row.pop("messages")),
    }
    damage = draw.choice(sorted(damages))
    which = draw.choice([[0], [1], [0, 1]])
    for index in which:
        damages[damage](rows[index])
    _write(file, rows)
    return f"rows {which}: {damage}", damage != "an answer first"


def _file_bytes(draw: random.Random, rows: list[Any], file: Path) -> tuple[str, bool]:
    """Broken bytes in the file of rows."""
    _write(file, rows)
    text = file.read_text()
    second = text.index("\n") + 1
    damages: dict[str, bytes] = {
        "cut": text[: draw.randrange(second + 1, len(text) - 2)].encode(),
        "empty": b"",
        "NUL bytes": b"\x00" * draw.randrange(1, 99),
        "random": draw.randbytes(500),
        "no UTF-8": text.replace("red", "\udcff").encode(errors="surrogateescape"),
        "a number": b"5\n",
        "texts": b'"red"\n"blue"\n',
        "a surrogate": text.replace("red", "\\ud800").encode(),
        "a list": b"[[1, 2]]\n",
    }
    damage = draw.choice(sorted(damages))
    file.write_bytes(damages[damage])
    return f"train.jsonl: {damage}", damage != "a surrogate"


def _image_bytes(draw: random.Random, rows: list[Any], file: Path) -> tuple[str, bool]:
    """A broken picture."""
    _write(file, rows)
    image = file.with_name("a.png")
    content = image.read_bytes()
    at = draw.randrange(8, len(content) // 2)
    damages: dict[str, bytes] = {
        "cut": content[:at],
        "empty": b"",
        "random": draw.randbytes(300),
        "text": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        "flipped": content[:at] + bytes([content[at] ^ 255]) + content[at + 1 :],
        "width": content[:16] + (2**31 - 1).to_bytes(4, "big") + content[20:],
        "no size": content[:16] + bytes(8) + content[24:],
    }
    damage = draw.choice(sorted(damages))
    image.write_bytes(damages[damage])
    return f"a.png: {damage}", damage != "flipped"


DATA_DAMAGES = (_row_damage, _file_bytes, _image_bytes)
