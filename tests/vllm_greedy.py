"""Replace a file of prompts, lists of tokens, by 32 greedy tokens each: run by vLLM's Python."""

import json
import os
import sys
from pathlib import Path

if __name__ == "__main__":
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = "2"  # GiB
    from vllm import LLM, SamplingParams, TokensPrompt

    model, file = sys.argv[1], Path(sys.argv[2])
    engine = LLM(model, dtype="float32", max_model_len=512, enforce_eager=True)
    prompts = [TokensPrompt(prompt_token_ids=tokens) for tokens in json.loads(file.read_text())]
    answers = engine.generate(prompts, SamplingParams(temperature=0, max_tokens=32))
    file.write_text(json.dumps([list(each.outputs[0].token_ids) for each in answers]))
