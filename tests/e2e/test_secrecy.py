"""Nothing outside private/ reveals the mask or the key."""

import base64
import re
from collections.abc import Iterator

import pytest
from safetensors import safe_open

from pmp_ds.ticket.ticket import load_ticket
from tests.e2e.conftest import MainRun

pytestmark = pytest.mark.e2e

RELEASE = {
    "README.md",
    "SHA256SUMS",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
}
RUN = {
    "config.yaml",
    "data.json",
    "machine.json",
    "metrics.jsonl",
    "metrics.prom",
    "plots",
    "private",
    "release",
    "report.html",
    "tensorboard",
    "tokenizer",
    "verified.json",
}


def spellings(secret: bytes) -> set[bytes]:
    """Return a secret as it is, in hex, and in base64 at any alignment."""
    found = {secret, secret.hex().encode(), secret.hex().upper().encode(), repr(secret).encode()}
    for shift in range(3):
        for encode in (base64.b64encode, base64.urlsafe_b64encode):
            found.add(encode(b"\0" * shift + secret)[4:-4])
    return found


def telling(bits: bytes) -> set[bytes]:
    """Return pieces of a packed mask that no other data contain by chance, from any byte on;
    none where (almost) all or none of the elements are trained."""
    pieces, start = set(), 0
    while len(piece := bits[start : start + 24]) == 24:
        if len(set(piece)) >= 12:
            pieces.add(piece)
        start += 24 if piece in pieces else 1
    return pieces


def public(main_run: MainRun) -> Iterator[tuple[str, bytes]]:
    """Return everything that a run shows: its commands' output, and its files outside private/."""
    for name in ("prepare", "train", "export", "report"):
        done = getattr(main_run, name)
        yield name, (" ".join(done.args) + done.stdout + done.stderr).encode()
    run = main_run.run
    for path in run.root.rglob("*"):
        yield str(path.relative_to(run.root)), b""  # its name
        if path.is_file() and run.private not in path.parents:
            yield str(path), path.read_bytes()


def test_only_known_files(main_run: MainRun):
    run = main_run.run
    assert {p.name for p in run.root.iterdir()} == RUN
    assert {p.name for p in run.release.iterdir()} == RELEASE
    assert re.fullmatch(r"events\.out\.\S+", next(run.tensorboard.iterdir()).name)


def test_no_key_and_no_mask_content(main_run: MainRun):
    run = main_run.run
    ticket = load_ticket(run.ticket)
    secrets = {bytes((run.init / "key").read_bytes()), bytes.fromhex(ticket.id)}
    for bits in ticket.mask.bits.values():
        secrets |= telling(bits.numpy().tobytes())
    assert len(secrets) > 4  # the key of the run is new each time, and so is its mask
    forms = set().union(*map(spellings, secrets))
    theta = re.findall(r"[0-9a-f]{64}", (run.init / "theta0.json").read_text())
    assert len(theta) == 3  # of the weights, of the key, and the seal of the first
    forms |= {digest.encode() for digest in theta}
    for where, content in public(main_run):
        assert not any(form in content or form in where.encode() for form in forms), where


def test_no_line_names_a_parameter(main_run: MainRun):
    """No line can therefore count a parameter's kept elements or its share of a norm."""
    names = load_ticket(main_run.run.ticket).mask.shapes
    leaves = {name.removeprefix("model.").removesuffix(".weight") for name in names} - {"norm"}
    assert {"embed_tokens", "layers.0.self_attn.q_proj"} <= leaves
    for where, content in public(main_run):
        if not where.endswith((".safetensors", "tokenizer.json")):
            assert not any(leaf.encode() in content for leaf in leaves), where


def test_release_tells_no_density(main_run: MainRun):
    release = main_run.run.release
    ticket = load_ticket(main_run.run.ticket)
    k, left = ticket.mask.num_kept, ticket.mask.num_params - ticket.mask.num_kept
    for path in release.iterdir():
        if path.suffix in (".md", ".json") and path.name != "tokenizer.json":
            text = path.read_text(encoding="utf-8").replace(",", "")
            assert not re.search(rf"density|\b0\.7\b|\b({k}|{left})\b", text), path
    with safe_open(release / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == set(ticket.mask.shapes)
