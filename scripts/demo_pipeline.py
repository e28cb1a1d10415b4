# Copyright 2026 The VLMoE authors. Licensed under the Apache License, Version 2.0.
"""Load a saved model in a fresh process and ask it about easy-VQA test images with chat messages.

    python -m vlmoe_cli.demo_pipeline outputs/demo/model

This is what a user of the model writes; `import vlmoe` is all that makes transformers know it.
"""

import sys

from .command_line import run_command

IMAGES = 4


def main(argv: list[str]) -> None:
    """Ask every shape and colour question about the first test images; print the answers."""
    if len(argv) != 1:
        raise ValueError("Give one model folder: python -m vlmoe_cli.demo_pipeline FOLDER")
    from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline

    import vlmoe  # noqa: F401 - registers the model with transformers
    from vlmoe.data.images import open_image
    from vlmoe.data.loading import load_rows

    model = AutoModelForImageTextToText.from_pretrained(argv[0])
    processor = AutoProcessor.from_pretrained(argv[0])
    ask = pipeline("image-text-to-text", model=model, processor=processor)
    for number, row in enumerate(load_rows("easy_vqa", "test", limit=IMAGES)):
        image = open_image(row["images"][0], f"test image {number}")
        for conversation, kind in zip(row["messages"], row["question_type"], strict=True):
            if kind == "yes/no":
                continue
            question = conversation[0]["content"][-1]["text"]
            parts = [
                {"type": "image", "image": image},
                {"type": "text", "text": question},
            ]
            chat = [{"role": "user", "content": parts}]
            answer = ask(text=chat, max_new_tokens=8, return_full_text=False)[0]["generated_text"]
            truth = conversation[-1]["content"][-1]["text"]
            print(f"image {number}: {question:<40} {answer:<12} (truth: {truth})")


if __name__ == "__main__":
    sys.exit(run_command("vlmoe demo", main))
