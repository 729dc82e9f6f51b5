"""Verify a staged release: compare a stranger's view of it with the source."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.initialization import no_init_weights

from pmp_ds.errors import UserError
from pmp_ds.model.build import context_length
from pmp_ds.model.parameters import constants
from pmp_ds.release.source import Source

# Largest difference of logits between processes, relative to the largest logit. Usually 0, but
# matrix kernels may round differently if a tensor is elsewhere in memory.
LOGITS_TOLERANCE = {torch.float32: 1e-5, torch.float16: 2.0**-9, torch.bfloat16: 2.0**-6}
_TEXT = "The quick brown fox's 1,234 jumps:\n\tnaïve café — déjà vu! def f(x): return x ** 2\n"
_RELOAD = Path(__file__).with_name("reload.py")
_TIMEOUT = 3600.0  # seconds


def verify_reload(source: Source, folder: Path, dtype: torch.dtype) -> float:
    """Load ``folder`` in a fresh process without pmp_ds and compare logits and token ids.

    Returns the largest absolute difference of logits. Raises RuntimeError when the release does
    not load or computes different logits, and UserError when its tokenizer encodes differently.
    Only one copy of the model is in memory: the other process ends before this one builds its own.
    """
    input_ids = probe(source.config)
    # Inside the folder, so that after a kill the next export removes both.
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        result = Path(scratch).resolve() / "answer.safetensors"
        run_alone(
            action="check",
            folder=str(folder.resolve()),
            result=str(result),
            input_ids=input_ids.tolist(),
            text=_TEXT,
            threads=torch.get_num_threads(),
        )
        with safe_open(result, "pt") as answer:
            logits, text_ids = answer.get_tensor("logits"), answer.get_tensor("text_ids")
            facts = answer.metadata()
    if json.loads(facts["problems"]) or facts["dtype"] != str(dtype):
        raise RuntimeError(f"the release does not load cleanly: {facts}")
    wanted = reference_logits(source, input_ids, dtype, json.loads(facts["wide"]))
    difference = require_same(logits, wanted, dtype)
    _compare_ids(folder, text_ids.tolist(), source.config.vocab_size)
    return difference


def probe(config: PreTrainedConfig) -> torch.Tensor:  # (2, T) int64
    """Return token ids that any model of ``config`` accepts."""
    length = min(16, context_length(config))
    return (torch.arange(2 * length) * 7919 % config.vocab_size).view(2, length)


def require_same(logits: torch.Tensor, wanted: torch.Tensor, dtype: torch.dtype) -> float:
    """Return the largest difference. Raises RuntimeError when rounding does not explain it."""
    difference = float((logits - wanted).abs().max())
    if not difference <= LOGITS_TOLERANCE[dtype] * float(wanted.abs().max()):
        raise RuntimeError(f"the release's logits differ by {difference} from the run's")
    return difference


def run_alone(**request: Any) -> None:
    """Run reload.py with ``request`` in a fresh, isolated, offline interpreter on the CPU."""
    blank = {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [sys.executable, "-I", str(_RELOAD)],
        input=json.dumps(request),
        env=os.environ | blank,
        cwd=tempfile.gettempdir(),
        capture_output=True,
        text=True,
        timeout=_TIMEOUT,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"the release does not load in a fresh process:\n{done.stderr[-2000:]}")


def reference_logits(
    source: Source, input_ids: torch.Tensor, dtype: torch.dtype, wide: Collection[str]
) -> torch.Tensor:  # (B, T, V) fp32
    """Return the logits of ``source`` in ``dtype``, with the parameters ``wide`` in fp32."""
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(source.config, dtype=dtype)
    model.tie_weights()
    for name in wide:
        model.get_parameter(name).data = model.get_parameter(name).data.float()
    with torch.inference_mode():
        for name, tensor in [*model.named_parameters(), *constants(model).items()]:
            tensor.copy_(source.tensor(name, dtype))
        logits: torch.Tensor = model.eval()(input_ids=input_ids, use_cache=False).logits
    return logits.float()


def _compare_ids(folder: Path, ids: list[int], vocab: int) -> None:
    if max(ids, default=0) >= vocab:
        raise UserError(f"the tokenizer gives the id {max(ids)}, but the model has {vocab} rows")
    plain = folder / "tokenizer.json"
    if not plain.is_file():
        return
    if Tokenizer.from_file(str(plain)).encode(_TEXT, add_special_tokens=False).ids != ids:
        raise UserError(
            "AutoTokenizer encodes differently from the run's tokenizer.json: set "
            '"tokenizer_class": "PreTrainedTokenizerFast" in its tokenizer_config.json'
        )
