"""Inputs that only one kind of file can be: archives, headers, batches, code."""

import gzip
import json
import pickle
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from tests.helpers import study
from tests.helpers.crafted import archives, corpora, tensors
from tests.helpers.crafted.variants import DEEP, NASTY, Change, bytes_
from tests.helpers.stores import write_store

Named = Iterator[tuple[str, Change]]


def special(kind: str) -> Named:
    """Yield (name, change of the folder) for the inputs of one kind."""
    return _SPECIAL.get(kind, lambda: iter(()))()


def _at(file: str, change: Change) -> Change:
    return lambda folder: change(folder / file)


def _json(file: str, **changes: Any) -> Change:
    """Change fields of the JSON object in ``file``."""

    def change(folder: Path) -> None:
        path = folder / file
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


class _Runs:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("ran"),)


_CODE = "open('ran', 'w').close()\n"


def _with_code(file: str, **changes: Any) -> Change:
    def change(folder: Path) -> None:
        (folder / "own.py").write_text(_CODE)
        _json(file, **changes)(folder)

    return change


def _pickled(name: str, *, alone: bool) -> Change:
    def change(folder: Path) -> None:
        (folder / name).write_bytes(pickle.dumps(_Runs()))
        if alone:
            (folder / "model.safetensors").unlink()

    return change


def _release() -> Named:
    config = "config.json"
    for name, content in tensors.files("model.embed_tokens.weight", [300, 32]):
        yield f"weights, {name}", _at("model.safetensors", bytes_(content))
    for name, changes in _CONFIGS.items():
        yield f"config.json: {name}", _with_code(config, **changes)
    for name in ("pytorch_model.bin", "model.pt", "training_args.bin", "model.ckpt"):
        for alone in (True, False):
            yield f"{name}, {'alone' if alone else 'beside'}", _pickled(name, alone=alone)
    for key in ("chat_template", "tokenizer_class", "auto_map", "processor_class"):
        for name, value in _TOKENIZERS.items():
            yield (
                f"tokenizer_config.json: {key} {name}",
                _with_code("tokenizer_config.json", **{key: value}),
            )


_CONFIGS: dict[str, dict[str, Any]] = {
    "auto_map": {"auto_map": {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}},
    "auto_map, own type": {"model_type": "own", "auto_map": {"AutoConfig": "own.C"}},
    "auto_map of the hub": {"auto_map": {"AutoModelForCausalLM": "who/what--own.M"}},
    "own type": {"model_type": "own"},
    "attention of the hub": {"_attn_implementation": "who/what"},
    "experts of the hub": {"experts_implementation": "who/what"},
    "quantized": {"quantization_config": {"quant_method": "bitsandbytes"}},
    "weights elsewhere": {"transformers_weights": "../../x.safetensors"},
    "config elsewhere": {"configuration_files": ["config.4.0.0.json"]},
    "name of the hub": {"_name_or_path": "who/what"},
    "a billion layers": {"num_hidden_layers": 10**9},
    "1024 layers": {"num_hidden_layers": 1024},
    "a million heads": {"num_attention_heads": 1 << 20},
    "no heads": {"num_attention_heads": 0},
    "heads of nothing": {"head_dim": 0},
    "half a head": {"num_attention_heads": 3, "head_dim": None},
    "vocabulary": {"vocab_size": 1 << 24},
    "no vocabulary": {"vocab_size": 0},
    "negative width": {"hidden_size": -32},
    "width": {"hidden_size": (1 << 31) - 1},
    "positions": {"max_position_embeddings": 1 << 27},
    "activation": {"hidden_act": NASTY},
    "activation, a list": {"hidden_act": ["silu"]},
    "rope type": {"rope_parameters": {"rope_type": NASTY}},
    "rope of text": {"rope_parameters": "x"},
    "rope factor": {"rope_parameters": {"rope_type": "linear", "factor": "x"}},
    "yarn": {"rope_parameters": {"rope_type": "yarn", "factor": 1e308}},
    "dtype": {"dtype": "float8_e4m3fn"},
    "dtype, an attribute": {"dtype": "nn"},
    "torch_dtype": {"torch_dtype": NASTY},
    "architectures": {"architectures": [NASTY]},
    "architectures, a number": {"architectures": 5},
    "padding outside": {"pad_token_id": 1 << 20},
    "padding below": {"pad_token_id": -5},
    "layer types": {"layer_types": ["own"] * 3},
    "an encoder": {"model_type": "vit"},
    "a text config": {"text_config": {"auto_map": {}}},
    "tensor parallel": {"base_model_tp_plan": {"layers.*": NASTY}},
    "labels": {"num_labels": 10**6},
    "label names": {"id2label": {NASTY: NASTY}},
    "tied to nothing": {"tie_word_embeddings": False},
    "another family": {"model_type": "gpt2"},
    "a mixture": {"model_type": "mixtral", "num_local_experts": 1024},
    "chunks": {"chunk_size_feed_forward": -1},
    "pruned heads": {"pruned_heads": {"0": [5]}},
}
_TOKENIZERS: dict[str, Any] = {
    "of code": {"AutoTokenizer": ["own.T", None]},
    "own": "OwnTokenizer",
    "list": ["x"],
    "number": 5,
    "template": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "loop": "{% for i in range(10**12) %}x{% endfor %}",
    "terminal": NASTY,
}


def _index() -> Named:
    file = "model.safetensors.index.json"
    for target in (
        "../x.safetensors",
        "/etc/passwd",
        "a/b.safetensors",
        "..\\x.safetensors",
        "",
        ".",
        "x\0.safetensors",
        NASTY,
        f"{NASTY}.safetensors",
        "x.bin",
        "x" * 5000,
        "/dev/zero",
        "config.json",
    ):
        yield (
            f"index leads to {target[-20:]!r}",
            _json(file, weight_map={"model.embed_tokens.weight": target}),
        )
    yield "a name of a tensor", _json(file, weight_map={NASTY: "model.safetensors"})


def _tokenizer() -> Named:
    file = "tokenizer.json"
    for key, values in _TOKENIZER_JSONS.items():
        for number, value in enumerate(values):
            yield f"{file}: {key} {number}", _json(file, **{key: value})
    for key in (
        "auto_map",
        "tokenizer_class",
        "eos_token",
        "added_tokens_decoder",
        "extra_special_tokens",
        "model_max_length",
        "chat_template",
    ):
        for name, value in _TOKENIZERS.items():
            yield (
                f"tokenizer_config.json: {key} {name}",
                _with_code("tokenizer_config.json", **{key: value}),
            )


def _split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


_REGEXES = (
    "(a*)*(b*)*(",
    "(x|x)*y",
    "(\\w+\\s?)*$y",
    "(.*)*(.*)*(.*)*=",
    "((a{1,1000}){1,1000}){1,1000}",
    "(?=(x+))\\1*y",
    "(" * 5000 + ")" * 5000,
    "x" * 1_000_000,
    "",
)
"""Patterns; some take time that doubles with every letter, or memory."""
_TOKENIZER_JSONS: dict[str, list[Any]] = {
    "model": [
        {"type": "BPE", "vocab": {"a": -1}, "merges": []},
        {"type": "BPE", "vocab": {"a": 1 << 40}, "merges": []},
        {"type": "BPE", "vocab": {"a": 1 << 31}, "merges": []},
        {"type": "BPE", "vocab": {"a": 0, "b": 0}, "merges": []},
        {"type": "BPE", "vocab": {}, "merges": []},
        {"type": "BPE", "vocab": {"a": 0}, "merges": [["x", "y"]]},
        {"type": "BPE", "vocab": {"a": 0}, "merges": ["a"]},
        {"type": "BPE", "vocab": {"a": 0}, "merges": [], "dropout": 5},
        {"type": "BPE", "vocab": {NASTY: 0}, "merges": [], "unk_token": NASTY},
        {"type": "Unigram", "vocab": [], "unk_id": 5},
        {"type": "Unigram", "vocab": [["a", float("nan")]], "unk_id": 0},
        {"type": "Unigram", "vocab": [["", 0.0]], "unk_id": 0},
        {
            "type": "WordPiece",
            "vocab": {"a": 0},
            "unk_token": "gone",
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 0,
        },
        {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "gone"},
        {"type": "Own"},
    ],
    "normalizer": [
        {"type": "Precompiled", "precompiled_charsmap": "AAAA"},
        {"type": "Precompiled", "precompiled_charsmap": "/////w=="},
        {"type": "Replace", "pattern": {"String": ""}, "content": "x" * 1000},
        {"type": "Replace", "pattern": {"Regex": ""}, "content": "x" * 1000},
        {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "x" * 10**6}] * 50},
    ],
    "pre_tokenizer": [
        *map(_split, _REGEXES),
        {"type": "Metaspace", "replacement": "", "prepend_scheme": "x"},
    ],
    "post_processor": [
        {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "x", "type_id": 0}}],
            "pair": [],
            "special_tokens": {},
        },
    ],
    "decoder": [{"type": "CTC", "pad_token": 5}],
    "truncation": [
        {"direction": "Right", "max_length": 0, "strategy": "LongestFirst", "stride": 1 << 40}
    ],
    "padding": [
        {
            "strategy": {"Fixed": 1 << 34},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "x",
        }
    ],
    "added_tokens": [
        [{"id": 1 << 40, "content": "x", "special": True}],
        [
            {
                "id": 0,
                "content": "",
                "special": True,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
            }
        ],
        [
            {
                "id": 5000,
                "content": NASTY,
                "special": True,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
            }
        ],
    ],
}


def _store() -> Named:
    manifest, shard = "store/manifest.json", "store/train/00000-000.arrow"
    for name, make in tensors.arrows():
        yield f"a shard, {name}", _sized(make)
    for token in (1000, 99_990, (1 << 32) - 40):
        yield f"a whole store with tokens from {token} on", partial(_with_token, token)
    for start in range(0, 400, 4):
        yield f"{shard}: bytes {start} to {start + 3} set", _at(shard, _set(start, b"\xff" * 4))
        yield f"{shard}: byte {start} halved", _at(shard, _set(start, b"\x7f"))
    for target in (
        "../store/train/00000-000.arrow",
        "/dev/zero",
        "/etc/passwd",
        "train",
        "",
        NASTY,
        "x\0y",
    ):
        yield f"manifest leads to {target[:20]!r}", _at(manifest, _first_shard(file=target))
    for key in ("bytes", "rows"):
        for value in (0, -1, 1 << 62):
            yield f"manifest: {key} {value}", _at(manifest, _first_shard(**{key: value}))


def _with_token(token: int, folder: Path) -> None:
    """Write correct sizes and hashes for a vocabulary of 100,000 tokens."""
    shutil.rmtree(folder / "store")
    write_store(folder / "store", token, 20)


def _set(start: int, content: bytes) -> Change:
    def change(path: Path) -> None:
        whole = bytearray(path.read_bytes())
        whole[start : start + len(content)] = content
        path.write_bytes(bytes(whole))

    return change


def _first_shard(**changes: Any) -> Change:
    def change(path: Path) -> None:
        manifest = json.loads(path.read_text())
        manifest["splits"]["train"]["shards"][0] |= changes
        path.write_text(json.dumps(manifest))

    return change


def _sized(make: Callable[[], bytes]) -> Change:
    """Write a shard with its size in the manifest."""

    def change(folder: Path) -> None:
        content = make()
        (folder / "store/train/00000-000.arrow").write_bytes(content)
        _first_shard(bytes=len(content))(folder / "store/manifest.json")

    return change


def _glue() -> Named:
    file = "SST-2/validation.jsonl.gz"
    row = b'{"sentence": "a", "label": 1}\n'
    for name, text in (("zeros", b"\0"), ("rows", row)):
        yield f"1 GiB of {name}", _at(file, _bomb(text))
    packed = gzip.compress(row)
    for name, content in (
        ("cut", packed[:-5]),
        ("junk behind", packed + b"junk"),
        ("twice", packed * 2),
        ("CRC", packed[:-8] + bytes(8)),
        ("nested", gzip.compress(packed)),
    ):
        yield f"gzip: {name}", _at(file, bytes_(content))
    for name in (NASTY.replace("/", ""), "train_x.jsonl", "validation.jsonl"):
        yield f"beside it {name[:12]!r}", _beside(name)


def _bomb(text: bytes) -> Change:
    """Return 1 GiB of ``text`` in few bytes."""

    def change(path: Path) -> None:
        with gzip.open(path, "wb", compresslevel=1) as packed:
            for _ in range(64):
                packed.write(text * ((16 << 20) // len(text)))

    return change


def _beside(name: str) -> Change:
    return _at(f"SST-2/{name}", bytes_(b"{}\n"))


def _results() -> Named:
    """Write well-typed lines that contradict each other."""
    from tests.helpers.crafted.kinds import _lines, measured

    for number, row in enumerate(measured()):
        for field in ("arm", "kind", "model", "hardware", "date"):
            changed = row | {field: NASTY}
            yield (
                f"{field} of line {number + 1}",
                _at("results.jsonl", bytes_(_lines([*measured(), changed]))),
            )
    yield from _pictures()
    audit = study.audit()
    attack = audit["attacks"][0]
    for name, changes in (
        ("leaks", {"leaks": [NASTY]}),
        ("attacks", {"attacks": []}),
        ("no chance", {"attacks": [attack | {"chance_iou": None}]}),
    ):
        yield f"audit: {name}", _json("audit.json", **changes)


def _pictures() -> Named:
    """Write contradictory numbers, and names that a picture shows."""
    from tests.helpers.crafted.kinds import _lines, measured

    named = [row | {"arm": f"{NASTY}$_{{"} for row in measured()]
    yield "names of arms", _at("results.jsonl", bytes_(_lines(named)))
    for name, values in _VALUES.items():
        rows = [row for row in measured() if row["kind"] == name.split(",")[0]]
        lines = [row | {"values": row["values"] | values} for row in rows]
        others = [row for row in measured() if row["kind"] != name.split(",")[0]]
        yield f"values: {name}", _at("results.jsonl", bytes_(_lines(others + lines)))


_NAN = float("nan")
_VALUES: dict[str, dict[str, Any]] = {
    "pretrain, no points": {"curve": []},
    "pretrain, one point": {"curve": [[0, 1.0]]},
    "pretrain, NaN": {"curve": [[_NAN, _NAN]] * 3, "val_loss": _NAN},
    "pretrain, infinite": {"curve": [[1, float("inf")]] * 3, "val_loss": float("inf")},
    "pretrain, IoU": {"iou": [_NAN, 2.0, -1e308, 1e308]},
    "pretrain, large": {"curve": [[1e308, 1e308], [-1e308, -1e308]]},
    "finetune, no metrics": {"metrics": {}},
    "finetune, no accuracy": {"metrics": {"SST-2": {}}},
    "finetune, no primary": {"primary": {}},
    "finetune, another primary": {"primary": {"SST-2": "x"}},
    "finetune, two columns": {
        "metrics": {"SST-2": {"accuracy": 0.5}, NASTY: {"accuracy": 0.5}},
        "primary": {"SST-2": "accuracy", NASTY: "accuracy"},
    },
    "finetune, NaN": {"metrics": {"SST-2": {"accuracy": _NAN}}},
    "finetune, no points": {"curve": []},
    "finetune, majority": {"majority": {NASTY: {}}},
    "landscape, ragged": {"directions": {"full": {"global": [[1.0], [1.0, 2.0]]}}},
    "landscape, short": {"alphas": [0.0]},
    "landscape, none": {"directions": {}},
    "landscape, no seeds": {"directions": {"full": {"global": [[]]}}},
    "landscape, terminal": {"directions": {NASTY: {"global": [[1.0] * 21]}}},
    "landscape, tuned": {"tuned": {"alphas": [0.0, 1.0], "losses": {"full": [1.0]}}},
    "gradients, short": {"edges_log10": [0.0]},
    "gradients, none": {"ticket": []},
    "gradients, NaN": {"edges_log10": [_NAN] * 45},
    "gradients, down": {"edges_log10": [0.0] * 45},
    "gradients, large": {"ticket": [1 << 62] * 44},
    "gradients, zeros": {"zeros": {}},
    "perplexity, NaN": {"loss": _NAN},
    "last_word, large": {"accuracy": 1e308},
    "lm_eval, terminal": {"metrics": {NASTY: {NASTY: 1.0}}},
    "lm_eval, infinite": {"metrics": {"x": {"acc,none": float("inf")}}},
    "untrained-head, no accuracy": {"metrics": {"RTE": {}}},
    "untrained-head, terminal": {"metrics": {NASTY: {"accuracy": 0.5}}},
}


def _keys() -> Named:
    for file in ("partner.pub", "key.txt"):
        for number, line in enumerate(
            (
                b"age1" + b"x" * 10**6,
                b"ssh-rsa",
                b"ssh-rsa AAAA",
                b"ssh-ed25519 ????",
                b"ssh-rsa x",
                b"AGE-SECRET-KEY-1",
                b"AGE-SECRET-KEY-1" + b"Q" * 58,
                b"AGE-PLUGIN-X-1QQ",
                b"-----BEGIN OPENSSH PRIVATE KEY-----\nAAAA\n-----END OPENSSH PRIVATE KEY-----",
                b"-----BEGIN RSA PRIVATE KEY-----\n",
                b"age-encryption.org/v1\n",
                b"# only a comment",
                NASTY.encode(),
                b"age1pq1" + b"q" * 2000,
                b"ssh-rsa " + b"A" * 10**5,
            )
        ):
            yield f"{file}: line {number}", _at(file, bytes_(line + b"\n"))


def _sentencepiece() -> Named:
    for start in (*range(0, 60, 2), *range(2000, 2400, 40)):
        yield f"bytes from {start} on set", _at("tokenizer.model", _set(start, b"\xff" * 6))
        yield f"bytes from {start} on zero", _at("tokenizer.model", _set(start, bytes(6)))


def _ticket() -> Named:
    for name, content in tensors.files("w", [2]):
        yield f"mask, {name}", _at("mask.safetensors", bytes_(content))
    for name in (NASTY, "", "x" * 10**5, "\u202e", "a\0b", "../x", "\ud800"):
        yield f"parameter {name[:8]!r}", _json("ticket.json", parameters={name: [8], "w": [3, 5]})
    shapes: list[Any] = [
        [-3, -5],
        [True, 15],
        ["15"],
        [15.0],
        [[15]],
        [None],
        [1 << 72],
        [0, 1 << 72],
        [1 << 40, 1 << 40],
        [1] * 100,
        [1 << 47],
        [0] * DEEP,
        "15",
        {"0": 15},
        15,
    ]
    for shape in shapes:
        yield f"shape {shape!r:.20}", _json("ticket.json", parameters={"w": shape, "b": [8]})


def _checkpoint() -> Named:
    home = "update-00000004"
    for name, content in tensors.files("exp_avg/w/0", [4]):
        yield f"state: {name}", _at(f"{home}/state/rank-00000.safetensors", bytes_(content))
    yield "a pickle", _at(f"{home}/x.pt", bytes_(pickle.dumps(_Runs())))


_SPECIAL: dict[str, Callable[[], Named]] = {
    "ticket": _ticket,
    "sealed ticket": archives.named,
    "release": _release,
    "sharded release": _index,
    "tokenizer": _tokenizer,
    "store": _store,
    "GLUE": _glue,
    "results": _results,
    "pictures": _pictures,
    "keys": _keys,
    "sentencepiece": _sentencepiece,
    "checkpoint": _checkpoint,
    "corpus": corpora.named,
}
