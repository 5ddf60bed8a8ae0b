"""What transformers, alone, makes of an exported directory.

`train.export.verification` runs this file as a script, in a fresh process: it imports nothing of ours, so that what it
computes is what any user of the export computes.

Usage: python reload.py MODEL_DIRECTORY REQUEST.json ANSWER.json
"""

import json
import sys
from typing import Any


def main(directory: str, request_file: str, answer_file: str) -> None:
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    transformers.utils.logging.disable_progress_bar()
    with open(request_file, encoding="utf-8") as stream:
        request = json.load(stream)
    device = torch.device(request["device"])
    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        directory,
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
        dtype=torch.float32,
        output_loading_info=True,
    )
    model, loading = loaded[0].to(device).eval(), loaded[1]

    def logprobs() -> list[list[float]]:
        """Log-probability of every token but the first of each window, in nats."""
        found = []
        for window in request["windows"]:
            tokens_1L = torch.tensor([window], device=device)
            predictions_LV = model(input_ids=tokens_1L).logits[0, :-1].float().log_softmax(-1)
            found.append(predictions_LV.gather(-1, tokens_1L[0, 1:, None])[:, 0].tolist())
        return found

    def chat_ids(messages: list[dict[str, str]]) -> list[int]:
        encoded: Any = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
        return list(encoded["input_ids"])

    def continuation(prompt: list[int]) -> list[int]:
        tokens_1L = torch.tensor([prompt], device=device)
        everywhere_1L = torch.ones_like(tokens_1L)
        answer_1L = model.generate(
            tokens_1L, attention_mask=everywhere_1L, do_sample=False, max_new_tokens=request["max_tokens"]
        )
        return answer_1L[0, len(prompt) :].tolist()

    with torch.inference_mode():
        ends = model.generation_config.eos_token_id
        answer: dict[str, Any] = {
            "text_ids": [tokenizer(text, add_special_tokens=False)["input_ids"] for text in request["texts"]],
            "chat_ids": [chat_ids(messages) for messages in request["conversations"]],
            "end_ids": ends if isinstance(ends, list) else [ends],
            "loading": {what: sorted(map(str, names)) for what, names in loading.items() if names},
            "logprobs": logprobs(),
            "continuations": [continuation(prompt) for prompt in request["prompts"]],
        }
        if request["dtype"] != "float32":
            model = model.to(getattr(torch, request["dtype"]))
            answer["rounded_logprobs"] = logprobs()
    answer["versions"] = {"transformers": transformers.__version__, "torch": torch.__version__}
    answer["modules"] = sorted({name.split(".")[0] for name in sys.modules})
    with open(answer_file, "w", encoding="utf-8") as stream:
        json.dump(answer, stream)


if __name__ == "__main__":
    main(*sys.argv[1:])
