"""Numbers out of range and options that nothing reads: one line before any work."""

import pytest

from vlmoe_cli import main

GENERATE = ["generate", "--model", "x", "?"]
SAMPLE = [*GENERATE, "--temperature"]
UPCYCLE = ["upcycle", "x", "--output_dir", "y"]
EVALUATE = ["evaluate", "--model", "x", "--dataset", "x"]
TRAIN = ["train", "--dataset", "x", "--use_cpu"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([*SAMPLE, "1", "--top_p", "5"], "'--top_p': must be above 0 and at most 1, got '5'"),
        ([*SAMPLE, "1", "--top_p", "0"], "'--top_p': must be above 0 and at most 1, got '0'"),
        ([*SAMPLE, "1", "--top_p", "red"], "'--top_p': could not convert"),
        ([*SAMPLE, "nan"], "'--temperature': must be 0"),
        ([*SAMPLE, "1e-40"], "or 0.0001 to 100, got '1e-40'"),
        ([*SAMPLE, "1e30"], "or 0.0001 to 100, got '1e30'"),
        ([*GENERATE, "--max_new_tokens", "0"], "must be greater than or equal to 1, got '0'"),
        ([*GENERATE, "--seed", "-1"], "'--seed': must be greater than or equal to 0"),
        ([*EVALUATE, "--batch_size", "0"], "'--batch_size': must be greater than or equal to 1"),
        ([*EVALUATE, "--max_rows", "-3"], "'--max_rows': must be greater than or equal to 1"),
        ([*EVALUATE, "--max_length", "0"], "'--max_length': must be greater than or equal to 1"),
        ([*TRAIN, "--num_train_epochs", "0"], "--num_train_epochs must be above 0, got 0.0"),
        ([*TRAIN, "--max_steps", "0"], "--max_steps must be 1 or more, or -1, got 0"),
        ([*TRAIN, "--learning_rate", "nan"], "--learning_rate must be above 0, got nan"),
        ([*TRAIN, "--learning_rate", "inf"], "--learning_rate must be above 0, got inf"),
        ([*TRAIN, "--per_device_train_batch_size", "-2"], "--per_device_train_batch_size must be"),
        ([*TRAIN, "--gradient_accumulation_steps", "0"], "--gradient_accumulation_steps must be 1"),
        ([*TRAIN, "--seed", "-1"], "--seed must be 0 or more"),
        ([*TRAIN, "--weight_decay", "nan"], "--weight_decay must be 0 or more"),
        (
            [*TRAIN, "--altered_copies", "-1"],
            "'--altered_copies': must be greater than or equal to 0",
        ),
        ([*TRAIN, "--report_to", "wandb"], "--report_to wandb cannot be used here"),
        ([*TRAIN, "--lora", "--lora_r", "0"], "'--lora_r': must be greater than or equal to 1"),
        ([*TRAIN, "--lora_r", "4"], "--lora_r changes nothing here: give --lora"),
        ([*TRAIN, "--lora_attention"], "--lora_attention changes nothing here: give --lora"),
        (
            [*TRAIN, "--max_eval_rows", "4"],
            "--max_eval_rows changes nothing here: give --eval_split",
        ),
        ([*TRAIN, "--eval_on_start"], "--eval_on_start needs an evaluation: give --eval_split"),
        ([*TRAIN, "--without_images", "--altered_copies", "1"], "--altered_copies changes nothing"),
        ([*GENERATE, "--top_p", "0.5"], "--top_p changes nothing here: give --temperature above 0"),
        ([*UPCYCLE, "--num_experts", "0"], "'--num_experts': must be greater than or equal to 1"),
        ([*UPCYCLE, "--drop_ratio", "0.1"], "--drop_ratio changes nothing here"),
        ([*UPCYCLE, "--router_std", "inf"], "'--router_std': must be 0 or more, and finite"),
    ],
)
def test_an_option_out_of_range_or_unread_is_one_line(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main(argv) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
