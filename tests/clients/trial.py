"""Try one release with one client: a script for the client's own environment, without pmp_ds.

    python trial.py CLIENT FOLDER RESULT

FOLDER holds release/ and expected.json (releases.py). RESULT gets, as JSON: `ids` and `greedy`, how
many of the texts gave the expected ones; `logits`, their largest difference; `also`, other features
that worked. An exception is the client's answer: the script ends with it, and `error` is its line.
"""

import json
import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Ids = list[int]
NEW_TOKENS = 12


class Trial:
    """Hold the expected results and those of the client."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.release = folder, str(folder / "release")
        expected = json.loads((folder / "expected.json").read_text(encoding="utf-8"))
        self.texts: list[str] = expected["texts"]
        self.ids: list[Ids] = expected["ids"]
        self._logits: list[list[float]] = expected["logits"]  # (T, V), of the first text
        self._greedy: list[Ids] = expected["greedy"]
        config = json.loads((folder / "release/config.json").read_text(encoding="utf-8"))
        self._eos: int = config["eos_token_id"]
        self.context: int = config.get("max_position_embeddings") or config["n_positions"]
        self.result: dict[str, Any] = {"also": []}

    def saw(
        self,
        *,
        ids: Sequence[Ids],
        greedy: Sequence[Ids],
        logits: Sequence[Sequence[float]] | None = None,
        logprobs: Sequence[Sequence[float]] | None = None,
    ) -> None:
        """Compare; ``logprobs`` are those after every token but the last."""
        self.result["ids"] = sum(a == b for a, b in zip(ids, self.ids, strict=True))
        cut = [self._until_eos(each) for each in greedy]
        wanted = [self._until_eos(each) for each in self._greedy]
        self.result["greedy"] = sum(a == b for a, b in zip(cut, wanted, strict=True))
        expected = self._logits
        if logprobs is not None:
            logits = logprobs
            expected = [_log_softmax(row) for row in expected[:-1]]
        assert logits is not None
        self.result["logits"] = max(
            abs(a - b)
            for found, row in zip(logits, expected, strict=True)
            for a, b in zip(found, row, strict=True)
        )
        self.result["of"] = max(abs(value) for row in self._logits for value in row)

    def also(self, what: str) -> None:
        self.result["also"].append(what)

    def _until_eos(self, ids: Ids) -> Ids:
        return ids[: ids.index(self._eos)] if self._eos in ids else ids


def _log_softmax(row: Sequence[float]) -> list[float]:
    top = max(row)
    total = top + math.log(sum(math.exp(value - top) for value in row))
    return [value - total for value in row]


def transformers(trial: Trial) -> None:
    import torch
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        DataCollatorForLanguageModeling,
        pipeline,
    )

    model = AutoModelForCausalLM.from_pretrained(trial.release, torch_dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(trial.release)
    greedy = []
    for text, ids in zip(trial.texts, trial.ids, strict=True):
        given = tokenizer(text, return_tensors="pt")
        output = model.generate(**given, max_new_tokens=NEW_TOKENS, do_sample=False)
        greedy.append(output[0, len(ids) :].tolist())
    with torch.inference_mode():
        logits = model(torch.tensor([trial.ids[0]])).logits[0].tolist()
    trial.saw(
        ids=[tokenizer(text)["input_ids"] for text in trial.texts], greedy=greedy, logits=logits
    )
    padded = tokenizer(trial.texts, padding=True, return_tensors="pt")
    model(**padded)
    trial.also("padding")
    long = tokenizer(" ".join(trial.texts * 50), truncation=True, return_tensors="pt")
    assert long["input_ids"].shape == (1, trial.context), long["input_ids"].shape
    model(**long)
    trial.also("truncation")
    generate = pipeline("text-generation", model=model, tokenizer=tokenizer, batch_size=2)
    assert len(generate(trial.texts, max_new_tokens=2)) == len(trial.texts)
    trial.also("pipeline")
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    assert math.isfinite(model(**collator([tokenizer(text) for text in trial.texts])).loss)
    trial.also("collator")
    assert AutoModelForCausalLM.from_pretrained(trial.release, torch_dtype="auto").dtype == (
        torch.bfloat16
    )
    trial.also("dtype")


def lm_eval(trial: Trial) -> None:
    import lm_eval as harness
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model = HFLM(pretrained=trial.release, dtype="float32", device="cpu", batch_size=2)
    ids = [model.tok_encode(text, add_special_tokens=True) for text in trial.texts]
    import torch

    logits = model._model_call(torch.tensor([trial.ids[0]]))[0].tolist()
    settings = {"until": [], "max_gen_toks": NEW_TOKENS, "do_sample": False}
    texts = model.generate_until(
        [Instance("generate_until", {}, (text, settings), i) for i, text in enumerate(trial.texts)]
    )
    wanted = [
        model.tokenizer.decode(trial._until_eos(each), skip_special_tokens=True)
        for each in trial._greedy
    ]
    same = [trial._greedy[i] if texts[i] == wanted[i] else [] for i in range(len(wanted))]
    trial.saw(ids=ids, greedy=same, logits=logits)
    data = trial.folder / "items.jsonl"
    rows = [{"text": text, "ends": [" one", " two"], "gold": 0} for text in trial.texts]
    data.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    task = {
        "task": "items",
        "dataset_path": "json",
        "output_type": "multiple_choice",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "doc_to_text": "{{text}}",
        "doc_to_choice": "{{ends}}",
        "doc_to_target": "{{gold}}",
    }
    found = harness.simple_evaluate(model=model, tasks=[task], task_manager=TaskManager())
    assert math.isfinite(found["results"]["items"]["acc,none"])
    trial.also("multiple choice")
    rolling = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in trial.texts]
    assert all(map(math.isfinite, model.loglikelihood_rolling(rolling)))
    trial.also("rolling likelihood")


def trl(trial: Trial) -> None:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    transformers(trial)
    settings = SFTConfig(
        output_dir=str(trial.folder / "sft"),
        max_steps=2,
        per_device_train_batch_size=2,
        report_to=[],
        use_cpu=True,
        bf16=False,
        save_strategy="no",
        max_length=32,
    )
    rows = Dataset.from_list([{"text": text} for text in trial.texts])
    trainer = SFTTrainer(model=trial.release, args=settings, train_dataset=rows)
    assert math.isfinite(trainer.train().training_loss)
    trial.also("SFT, 2 updates")


def ctranslate2(trial: Trial) -> None:
    import ctranslate2 as ct2
    import numpy as np
    from transformers import AutoTokenizer

    out = str(trial.folder / "ctranslate2")
    ct2.converters.TransformersConverter(trial.release).convert(out, force=True)
    generator = ct2.Generator(out, compute_type="float32")
    tokenizer = AutoTokenizer.from_pretrained(trial.release)
    tokens = [tokenizer.convert_ids_to_tokens(ids) for ids in trial.ids]
    logits = np.array(generator.forward_batch([tokens[0]]))[0]
    # One by one: in a batch, a prompt of one token spoils the others (seen in 4.8.5).
    greedy = [
        generator.generate_batch(
            [each], max_length=NEW_TOKENS, sampling_topk=1, include_prompt_in_result=False
        )[0]
        for each in tokens
    ]
    trial.saw(
        ids=[tokenizer(text)["input_ids"] for text in trial.texts],
        greedy=[result.sequences_ids[0] for result in greedy],
        logits=logits.tolist(),
    )


def llama_cpp(trial: Trial) -> None:
    import llama_cpp as cpp

    file = trial.folder / "model.gguf"
    convert = next(Path(sys.prefix).glob("llama.cpp/convert_hf_to_gguf.py"))
    # The converter recognises only well-known byte-level tokenizers, by their output for one text.
    named = f"""
import runpy, sys
sys.path.insert(0, {str(convert.parent)!r})
sys.path.insert(1, {str(convert.parent / "gguf-py")!r})
from conversion.base import TextModel
TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
runpy.run_path({str(convert)!r}, run_name="__main__")
"""
    start = ["-c", named] if trial.folder.name == "gpt2" else [str(convert)]
    command = [sys.executable, *start, trial.release, "--outfile", str(file), "--outtype", "f32"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, f"convert_hf_to_gguf.py: {done.stderr.strip().splitlines()[-1]}"
    model = cpp.Llama(str(file), logits_all=True, n_ctx=trial.context, verbose=False)
    ids = [model.tokenize(text.encode()) for text in trial.texts]
    model.reset()
    model.eval(trial.ids[0])
    logits = model.scores[: len(trial.ids[0])].tolist()
    greedy = []
    for each in ids:
        model.reset()
        found = model.generate(each, top_k=1, temp=0.0, repeat_penalty=1.0)
        greedy.append([token for token, _ in zip(found, range(NEW_TOKENS), strict=False)])
    trial.saw(ids=ids, greedy=greedy, logits=logits)
    model.create_completion(trial.texts[0], max_tokens=2)
    trial.also("completion")


def mlx_lm(trial: Trial) -> None:
    import mlx.core as mx
    from mlx_lm import load
    from mlx_lm.generate import generate_step

    mx.set_default_device(mx.cpu)
    model, tokenizer = load(trial.release)
    model.set_dtype(mx.float32)
    greedy = [
        [int(token) for token, _ in generate_step(mx.array(ids), model, max_tokens=NEW_TOKENS)]
        for ids in trial.ids
    ]
    trial.saw(
        ids=[tokenizer.encode(text) for text in trial.texts],
        greedy=greedy,
        logits=model(mx.array([trial.ids[0]]))[0].tolist(),
    )


def vllm(trial: Trial) -> None:
    from vllm import LLM, SamplingParams

    model = LLM(
        model=trial.release,
        dtype="float32",
        max_model_len=trial.context,
        enforce_eager=True,
        max_logprobs=-1,
        gpu_memory_utilization=0.1,  # of the memory; it runs on CPU
    )
    settings = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, prompt_logprobs=-1)
    outputs = model.generate(trial.texts, settings)
    prompt = outputs[0].prompt_logprobs
    logprobs = [[row[i].logprob for i in range(len(row))] for row in prompt[1:]]
    trial.saw(
        ids=[list(output.prompt_token_ids) for output in outputs],
        greedy=[list(output.outputs[0].token_ids) for output in outputs],
        logprobs=logprobs,
    )
    trial.also("batch")


CLIENTS: dict[str, Callable[[Trial], None]] = {
    "transformers": transformers,
    "lm-eval": lm_eval,
    "TRL": trl,
    "CTranslate2": ctranslate2,
    "llama.cpp": llama_cpp,
    "mlx-lm": mlx_lm,
    "vLLM": vllm,
}


def main() -> None:
    client, folder, result = sys.argv[1:]
    trial = Trial(Path(folder))
    try:
        CLIENTS[client](trial)
    except BaseException as error:
        said = str(error).strip().splitlines() or [""]
        trial.result["error"] = f"{type(error).__name__}: {said[0]}".removesuffix(": ")
        raise
    finally:
        Path(result).write_text(json.dumps(trial.result), encoding="utf-8")


if __name__ == "__main__":
    main()
