"""The masked update as a library: three lines on a plain module and on a user's own engine."""

import os
import re
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch

from pmp_ds import dist
from pmp_ds.config import MaskConfig
from pmp_ds.discover.discover import random_ticket
from pmp_ds.errors import UserError
from pmp_ds.model.parameters import parameter_table
from pmp_ds.optim.attach import attach
from pmp_ds.optim.masked import MaskedOptimizer
from pmp_ds.optim.masked_adamw import MaskedAdamW
from pmp_ds.optim.masked_rules import MaskedLion, MaskedSGD
from pmp_ds.run_dir import RunDir
from pmp_ds.ticket.mask import ParamMask, full_bits
from pmp_ds.ticket.ticket import load_ticket, save_ticket
from tests.helpers import tiny
from tests.helpers.tiers import daily

REPO = Path(__file__).resolve().parents[2]
STEPS, SIZE, CLIP = 5, 4, 0.2
KINDS = {"adamw": MaskedAdamW, "lion": MaskedLion, "sgd": MaskedSGD}


def loss_of(model: Any, batch: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=batch, use_cache=False).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())


def mask() -> ParamMask:
    return random_ticket(b"a" * 32, MaskConfig(source="random"), parameter_table(tiny.model())).mask


def plain(kind: str) -> dict[str, torch.Tensor]:
    """Train on a torch module: the user's own loop, with torch's own clipping."""
    model = tiny.model()
    optimizer: MaskedOptimizer = KINDS[kind](model.parameters(), lr=3e-3, weight_decay=0.1)
    attach(model, optimizer, mask())
    for step in range(1, STEPS + 1):
        loss_of(model, tiny.batch(step, SIZE)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
    return {name: param.detach().clone() for name, param in model.named_parameters()}


def engine(kind: str, stage: int, accumulation: int) -> dict[str, torch.Tensor]:
    """Train on an engine that the user made, with our optimizer and one call of attach."""
    model = tiny.model()
    optimizer: MaskedOptimizer = KINDS[kind](model.parameters(), lr=3e-3, weight_decay=0.1)
    config = tiny.ds_json(stage) | {
        "train_micro_batch_size_per_gpu": SIZE // dist.world_size() // accumulation,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": CLIP,
        "zero_allow_untested_optimizer": True,
    }
    users, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    attach(users, optimizer, mask())
    for step in range(1, STEPS + 1):
        share = tiny.batch(step, SIZE).chunk(dist.world_size())[dist.rank()]
        for micro_batch in share.chunk(accumulation):
            users.backward(loss_of(users, micro_batch))
            users.step()
    weights = {}
    for name, param in users.module.named_parameters():
        with deepspeed.zero.GatheredParameters([param], enabled=stage == 3):
            weights[name] = param.detach().clone()
    users.destroy()
    return weights


def refused(stage: int) -> list[str]:
    """Return the errors of attach for tickets of other models, on an engine; the last ticket
    fits."""
    model, own, said = tiny.model(), mask(), []
    optimizer = MaskedAdamW(model.parameters(), lr=3e-3)
    config = tiny.ds_json(stage) | {
        "train_micro_batch_size_per_gpu": SIZE // dist.world_size(),
        "zero_allow_untested_optimizer": True,
    }
    users, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    name = next(iter(own.shapes))
    lacking = {n: shape for n, shape in own.shapes.items() if n != name}
    for shapes in (lacking, lacking | {name: (3, 5)}, own.shapes):
        bits = {n: full_bits(torch.Size(s).numel()) for n, s in shapes.items()}
        try:
            attach(users, optimizer, ParamMask(bits=bits, shapes=shapes))
        except UserError as error:
            said.append(str(error))
    users.destroy()
    return said


def documented(code: str, folder: str) -> dict[str, torch.Tensor]:
    """Run the code of docs/LIBRARY.md unchanged, then a few updates with the result."""
    os.chdir(folder)
    ticket = random_ticket(b"a" * 32, MaskConfig(source="random"), parameter_table(tiny.model()))
    RunDir(Path("runs/demo")).create()
    save_ticket(ticket, Path("runs/demo/private/ticket"))
    config = tiny.ds_json(1) | {
        "train_micro_batch_size_per_gpu": SIZE,
        "zero_allow_untested_optimizer": True,
    }
    names: dict[str, Any] = {
        "Path": Path,
        "load_ticket": load_ticket,
        "MaskedAdamW": MaskedAdamW,
        "attach": attach,
        "deepspeed": deepspeed,
        "model": tiny.model(),
        "ds_config": config,
    }
    exec(code, names)  # noqa: S102 - our own document
    users = names["engine"]
    for step in range(1, STEPS + 1):
        users.backward(loss_of(users, tiny.batch(step, SIZE)))
        users.step()
    weights = {name: p.detach().clone() for name, p in users.module.named_parameters()}
    users.destroy()
    os.chdir(REPO)
    return weights


def check(weights: dict[str, torch.Tensor]) -> None:
    kept = mask()
    for name, initial in tiny.model().named_parameters():
        frozen = ~kept.full(name)
        assert torch.equal(weights[name][frozen], initial.detach()[frozen])
        assert not torch.equal(weights[name], initial.detach())


@pytest.mark.parametrize("kind", KINDS)
def test_plain_module(kind):
    check(plain(kind))


@pytest.mark.distributed
def test_lines_of_the_document(ranks1, tmp_path):
    text = (REPO / "docs" / "LIBRARY.md").read_text(encoding="utf-8")
    code, _ = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    check(ranks1.run(documented, code, str(tmp_path))[0])


@pytest.mark.distributed
@pytest.mark.parametrize("stage", daily([1, 3], [3]))
def test_an_engine_with_the_ticket_of_another_model(ranks2, stage):
    missing, other = ranks2.run(refused, stage)[0]
    assert missing.startswith(
        "the ticket belongs to another model: 'model.embed_tokens.weight' is of"
    )
    way_out = "freeze parameters outside the ticket with requires_grad_(False)"
    assert missing.endswith(f"in the model and missing in the ticket; {way_out}")
    assert other.endswith("in the model and of shape [3, 5] in the ticket")


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("kind", "stage", "accumulation"),
    daily(
        [
            ("adamw", 0, 1),
            ("adamw", 1, 2),
            ("adamw", 2, 1),
            ("adamw", 3, 2),
            ("lion", 2, 1),
            ("sgd", 3, 1),
        ],
        [("adamw", 1, 2), ("adamw", 3, 2), ("lion", 2, 1)],
    ),
)
def test_users_engine_follows_the_plain_module(ranks2, kind, stage, accumulation):
    weights = ranks2.run(engine, kind, stage, accumulation)[0]
    check(weights)
    # Lion steps by the sign of a sum: an element at zero may flip, by at most two steps each.
    tolerance = 2 * STEPS * 3e-3 if kind == "lion" else 1e-5
    for name, expected in plain(kind).items():
        torch.testing.assert_close(weights[name], expected, atol=tolerance, rtol=0)
