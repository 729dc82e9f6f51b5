"""A user's training loop without a mask, which uses pmp_ds only for checkpoints.

python -m pmp_ds.launch --ranks 2 tests/helpers/plain_loop.py FOLDER STAGE STEPS
"""

import json
import os
import sys
import time
from typing import Any

import deepspeed
import torch

from pmp_ds import dist
from pmp_ds.state import library

BATCH = 12  # divides by 1, 2 and 3 ranks


class Net(torch.nn.Module):
    """A model that is not from Hugging Face, with one buffer and one parameter of an odd size."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(7, 33), torch.nn.Linear(33, 1, bias=False)
        self.register_buffer("seen", torch.zeros((), dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)))


def optimizer_of(kind: str, model: torch.nn.Module) -> torch.optim.Optimizer:
    if kind == "adamw":
        return torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def train(
    folder: str,
    stage: int,
    steps: int,
    kind: str = "adamw",
    precision: str = "fp32",
    pause: float = 0,
) -> tuple[int, list[float], dict[str, torch.Tensor]]:
    """Return the updates done at the start, the losses since, and the weights of rank 0 at the
    end."""
    torch.manual_seed(0)
    model = Net()
    found = library.find(folder)
    if found:
        library.verify(found)
        library.load_weights(found, model)
    optimizer = optimizer_of(kind, model)
    config: dict[str, Any] = {
        "train_batch_size": BATCH,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": precision == "bf16"},
    }
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        config=config,
        dist_init_required=False,
        lr_scheduler=torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=20),
    )
    done = library.resume(engine, found) if found else 0
    losses = []
    for step in range(done + 1, steps + 1):
        data = torch.randn(BATCH, 7, generator=torch.Generator().manual_seed(step))
        share = data.chunk(dist.world_size())[dist.rank()]
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        loss = (engine(share.to(dtype)).float() - share.sum(1, keepdim=True).sin()).square().mean()
        engine.backward(loss)
        engine.step()
        engine.module.seen.add_(1)
        losses.append(float(dist.all_reduce_sum(loss.detach().clone())) / dist.world_size())
        if step % 3 == 0:
            library.save(engine, folder, step, {"last": losses[-1]})
            library.prune(folder, keep=2)
        time.sleep(pause)
    weights = dict(library.DenseEngine(engine).parameters())
    seen = {"seen": engine.module.seen.clone()}
    engine.destroy()
    return done, losses, weights | seen


if __name__ == "__main__":
    dist.init()
    begun, found_losses, _ = train(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), pause=0.05)
    if os.environ["RANK"] == "0":
        print(json.dumps([begun, found_losses]), flush=True)
