"""What a person does with a folder that someone else saved; used by test_hub_loading.py and
test_native_pairs.py.

Run as a program, `python -P reader_without_vlmoe.py jobs.json results.pt`, it can import nothing of
`vlmoe`. The jobs are `[[function, {argument: value}], ...]`; the results come in the same order.
The functions import what they need, so that a process pays only for what it does.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch

FORBIDDEN = ("vlmoe", "vlmoe_cli")


class Forbid:
    """Lets nothing of ours be imported, however it is installed."""

    @staticmethod
    def find_spec(name: str, *args: Any) -> None:
        if name.partition(".")[0] in FORBIDDEN:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def refusals(folder: str) -> dict[str, str]:
    """What each way of loading says where nobody said that the code is trusted."""
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, pipeline

    ways = {
        "config": AutoConfig.from_pretrained,
        "model": AutoModelForImageTextToText.from_pretrained,
        "processor": AutoProcessor.from_pretrained,
        "pipeline": lambda path, **options: pipeline("image-text-to-text", model=path, **options),
    }
    said = {}
    for way, load in ways.items():
        for options in ({}, {"trust_remote_code": False}):
            try:
                said[f"{way} {options}"] = f"loaded {load(folder, **options)}"
            except ValueError as error:
                said[f"{way} {options}"] = str(error)
    return said | {"executed": " ".join(name for name in sys.modules if "transformers_mod" in name)}


def errors(folder: str) -> list[str]:
    """What loading a folder says whose weights are not those of its config."""
    from transformers import AutoModel, AutoModelForImageTextToText, pipeline

    said = []
    for load in (
        AutoModel.from_pretrained,
        AutoModelForImageTextToText.from_pretrained,
        lambda path, **options: pipeline("image-text-to-text", model=path, **options),
    ):
        try:
            said.append(f"loaded {load(folder, trust_remote_code=True)}")
        except ValueError as error:
            said.append(str(error))
    return said


def chat_tokens(folder: str, text: str) -> list[int]:
    """The tokens of a chat whose user writes `text`."""
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    return processor.apply_chat_template([{"role": "user", "content": text}], tokenize=True)[0]


def read(folder: str, image: str, text: str) -> dict[str, Any]:
    """Load the parts and run them, with three implementations of the experts."""
    from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor

    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
    headless = AutoModel.from_pretrained(folder, trust_remote_code=True)
    inputs = processor(images=[image], text=[text], return_tensors="pt")
    with torch.no_grad():
        hidden = headless(**inputs).last_hidden_state
        outputs = model(**inputs, output_router_logits=True)
        model.set_experts_implementation("batched_mm")
        batched = model(**inputs).logits
        model.set_experts_implementation("auto")
        auto = model(**inputs).logits
    return {
        "modules": [type(part).__module__ for part in (config, processor, model, headless)],
        "tensors": {
            **inputs,
            "logits": outputs.logits,
            "router_logits": torch.stack(outputs.router_logits),
            "batched": batched,
            "auto": auto,
            "hidden": hidden,
        },
    }


def read_text_model(folder: str) -> torch.Tensor:
    """The decoder alone: hidden states of a few tokens."""
    from transformers import AutoModel

    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    with torch.no_grad():
        return model(input_ids=torch.arange(6, 18)[None]).last_hidden_state


def ask(folder: str, image: str, question: str, new_tokens: int) -> dict[str, Any]:
    """The one line: a pipeline."""
    from transformers import pipeline

    pipe = pipeline("image-text-to-text", model=folder, trust_remote_code=True)
    parts = [{"type": "image", "image": image}, {"type": "text", "text": question}]
    messages = [{"role": "user", "content": parts}]
    inputs = pipe.processor.apply_chat_template(
        messages, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    with torch.no_grad():
        logits = pipe.model(**inputs).logits
    answer = pipe(text=messages, max_new_tokens=new_tokens, return_full_text=False)
    return {"logits": logits, "answer": answer[0]["generated_text"]}


def watch(folder: str, video: str, question: str, new_tokens: int) -> str:
    """A pipeline about a video file."""
    from transformers import pipeline

    pipe = pipeline("image-text-to-text", model=folder, trust_remote_code=True)
    parts = [{"type": "video", "video": video}, {"type": "text", "text": question}]
    chat = [{"role": "user", "content": parts}]
    return pipe(text=chat, max_new_tokens=new_tokens, return_full_text=False)[0]["generated_text"]


def write(folder: str, text: str, new_tokens: int) -> dict[str, Any]:
    """Text alone: a text-generation pipeline, on a text and on a chat."""
    from transformers import pipeline

    pipe = pipeline("text-generation", model=folder, trust_remote_code=True)
    options = {"max_new_tokens": new_tokens, "return_full_text": False, "do_sample": False}
    given = {"text": text, "chat": [{"role": "user", "content": text}]}
    return {name: pipe(each, **options)[0]["generated_text"] for name, each in given.items()}


def native(folder: str, inputs: str) -> torch.Tensor:
    """Logits of a model whose class is one of transformers'; no code of its own is trusted."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    config = AutoConfig.from_pretrained(folder)
    auto = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
    model, info = auto.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        return model(**torch.load(inputs)).logits


def save_again(folder: str, to: str) -> None:
    """Load and save, as after a small change."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
    model.save_pretrained(to)
    AutoProcessor.from_pretrained(folder, trust_remote_code=True).save_pretrained(to)
    model.config.text_config.save_pretrained(f"{to}/text")  # a class that no Auto class loaded


def adapt(base: str, adapter: str, inputs: str) -> list[torch.Tensor]:
    """Logits of an adapter on its base: by PEFT, and by two Auto classes, which find the base."""
    from peft import AutoPeftModelForCausalLM, PeftModel
    from transformers import AutoModelForImageTextToText

    batch = torch.load(inputs)
    load = AutoModelForImageTextToText.from_pretrained
    model = load(base, trust_remote_code=True)
    with torch.no_grad():
        plain = model(**batch).logits
        by_peft = PeftModel.from_pretrained(model, adapter).eval()(**batch).logits
        by_auto_class = load(adapter, trust_remote_code=True)(**batch).logits
        alone = AutoPeftModelForCausalLM.from_pretrained(adapter, trust_remote_code=True)
        by_auto_peft = alone.eval()(**batch).logits
    return [plain, by_peft, by_auto_class, by_auto_peft]


def train_adapter(base: str, adapter: str, inputs: str) -> torch.Tensor:
    """LoRA on experts and attention by PEFT's own path, trained a little; its logits."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForImageTextToText

    torch.manual_seed(2)
    config = LoraConfig(
        r=3,
        target_modules=["q_proj"],
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
        task_type="CAUSAL_LM",
    )
    model = AutoModelForImageTextToText.from_pretrained(base, trust_remote_code=True)
    model = get_peft_model(model, config).train()
    optimizer = torch.optim.AdamW(model.parameters(), 0.05)
    ids = torch.arange(6, 20).view(2, 7)
    for _ in range(3):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval().save_pretrained(adapter)
    with torch.no_grad():
        return model(**torch.load(inputs)).logits


def resume(checkpoint: str, rows: str, output_dir: str, options: dict[str, Any]) -> int:
    """Go on training from a checkpoint with a plain Trainer; the step it ended at."""
    from transformers import (
        AutoModelForImageTextToText,
        AutoProcessor,
        Trainer,
        TrainingArguments,
        default_data_collator,
    )

    trainer = Trainer(
        model=AutoModelForImageTextToText.from_pretrained(checkpoint, trust_remote_code=True),
        args=TrainingArguments(output_dir=output_dir, **options),
        train_dataset=torch.load(rows),
        data_collator=default_data_collator,
        processing_class=AutoProcessor.from_pretrained(checkpoint, trust_remote_code=True),
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    return trainer.state.global_step


def main(jobs: str, results: str) -> None:
    """Do the jobs of one process."""
    torch.set_num_threads(1)
    done = [globals()[name](**arguments) for name, arguments in json.loads(Path(jobs).read_text())]
    assert not any(name.partition(".")[0] in FORBIDDEN for name in sys.modules)
    torch.save(done, results)


if __name__ == "__main__":
    sys.meta_path.insert(0, Forbid)  # type: ignore[arg-type]
    main(*sys.argv[1:])
