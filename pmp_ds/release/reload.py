"""A script that loads a release as a stranger would, run alone in a fresh interpreter.

It reads one JSON request on standard input and writes its answer to ``request["result"]``:

    {"action": "check", "folder", "result", "input_ids": [[...]], "text", "threads"}
        -> safetensors: "logits" (B, T, V) fp32, "text_ids" (N,) int64; metadata: problems, dtype,
           and the parameters that transformers keeps in fp32 in a release of 16 bits
    {"action": "generate", "folder", "result", "prompt", "max_new_tokens", "seed": int or null}
        -> the prompt and its continuation, UTF-8

It must not import pmp_ds, and prevents that anything else does.
"""

import json
import sys
from pathlib import Path
from typing import Any

_OFFLINE: Any = {"local_files_only": True, "trust_remote_code": False, "use_safetensors": True}


def main() -> None:
    sys.modules["pmp_ds"] = None  # type: ignore[assignment]  # an import of it now fails
    request = json.load(sys.stdin)
    {"check": _check, "generate": _generate}[request["action"]](request)


def _check(request: dict[str, Any]) -> None:
    import torch
    from safetensors.torch import save_file
    from transformers import AutoTokenizer

    torch.set_num_threads(request["threads"])
    found = compute(request["folder"], torch.tensor(request["input_ids"]))
    logits, problems, dtype, wide = found
    tokenizer = AutoTokenizer.from_pretrained(
        request["folder"], local_files_only=True, trust_remote_code=False
    )
    ids = tokenizer.encode(request["text"], add_special_tokens=False)
    save_file(
        {"logits": logits, "text_ids": torch.tensor(ids, dtype=torch.int64)},
        request["result"],
        metadata={"problems": json.dumps(problems), "dtype": dtype, "wide": json.dumps(wide)},
    )


def compute(folder: str, input_ids: Any) -> tuple[Any, dict[str, list[str]], str, list[str]]:
    """Return the logits (B, T, V) fp32 of a release, problems while loading it, its dtype, and the
    parameters that are in fp32 nevertheless."""
    import torch
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **_OFFLINE)
    problems = {key: sorted(map(str, value)) for key, value in info.items() if value}
    with torch.inference_mode():
        logits = model.eval()(input_ids=input_ids, use_cache=False).logits
    wide = [
        name
        for name, param in model.named_parameters()
        if param.dtype == torch.float32 != model.dtype
    ]
    return logits.float().contiguous(), problems, str(model.dtype), wide


def _generate(request: dict[str, Any]) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(request["folder"], **_OFFLINE).eval()
    tokenizer = AutoTokenizer.from_pretrained(
        request["folder"], local_files_only=True, trust_remote_code=False
    )
    ids = tokenizer.encode(request["prompt"], add_special_tokens=False)
    if not ids:
        ids = [model.config.eos_token_id]
    input_ids = torch.tensor([ids])
    sampled = request["seed"] is not None
    if sampled:
        torch.manual_seed(request["seed"])
    output = model.generate(
        input_ids=input_ids,
        attention_mask=torch.ones_like(input_ids),
        max_new_tokens=request["max_new_tokens"],
        do_sample=sampled,
    )
    text = tokenizer.decode(output[0], skip_special_tokens=True)
    Path(request["result"]).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
