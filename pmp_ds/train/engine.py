"""A DeepSpeed engine that trains only a ticket.

Between ``backward`` and ``step`` the complement of the reduced gradient shards is zeroed, so that
the norm DeepSpeed reports and clips with is the ticket's; the client optimizer then updates the
ticket's elements and touches no other (paper, Eq. 5).
"""

from collections.abc import Iterator
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from transformers import PreTrainedModel

from pmp_ds import dist
from pmp_ds.config import TrainConfig
from pmp_ds.optim.logical_state import Read, collect, restore
from pmp_ds.optim.masked_adamw import MaskedAdamW, parameter_groups
from pmp_ds.optim.zero_shards import flat_masks, shards_of
from pmp_ds.ticket.mask import ParamMask
from pmp_ds.train.deepspeed_config import merge


class Engine:
    """One model under DeepSpeed with a masked optimizer; frozen until ``arm``.

    ``model`` is on CPU in fp32 and holds the weights to start from.
    """

    def __init__(
        self, model: PreTrainedModel, config: TrainConfig, ds_config: dict[str, Any]
    ) -> None:
        self.optimizer = MaskedAdamW(
            parameter_groups(model.named_parameters(), config.weight_decay),
            lr=config.lr,
            betas=config.betas,
            eps=config.eps,
        )
        self.hf_config = model.config
        self._micro_batch_size = config.micro_batch_size
        self._sixteen_bit = config.precision != "fp32"
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        self._engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=self.optimizer,
            config=merge(ds_config, config, dist.world_size()),
            dist_init_required=False,
        )
        # DeepSpeed casts buffers too; the rotary frequencies must stay fp32, as in the release.
        for name, buffer in self._engine.module.named_buffers():
            buffer.data = buffers[name].to(buffer.device)
        self.shards = shards_of(self._engine)

    def arm(self, mask: ParamMask | None) -> None:
        """Train the elements in ``mask`` (None: all) from fresh moments."""
        self.optimizer.arm(flat_masks(self.shards, mask))

    @property
    def device(self) -> torch.device:
        return torch.device(self._engine.device)

    def block_losses(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Mean next-token cross-entropy in nats of each of (B, T) int64 blocks, (B,) fp32; labels
        equal inputs."""
        logits = self._engine(input_ids=input_ids, use_cache=False).logits
        losses = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(), input_ids[:, 1:].flatten(), reduction="none"
        )
        return losses.view(input_ids.shape[0], -1).mean(dim=1)

    def backward(self, batch: torch.Tensor) -> torch.Tensor:
        """Gradients of this rank's share of one update, (B / world_size, T) int64; reduced over
        ranks and accumulation steps on return. Returns the mean loss of the share, () fp32."""
        self._engine.train()
        micro_batches = batch.to(self.device, non_blocking=True).split(self._micro_batch_size)
        total = torch.zeros((), device=self.device)
        for i, micro_batch in enumerate(micro_batches):
            if i:  # DeepSpeed wants `step` after every `backward`; it updates at the last alone
                self._engine.step()
            loss = self.block_losses(micro_batch).mean()
            self._engine.backward(loss)
            total += loss.detach()
        self.shards.zero_padding()
        return total / len(micro_batches)

    def step(self, lr: float) -> torch.Tensor | float:
        """Mask the gradient, clip it, update the ticket. Returns the norm of the masked gradient
        before clipping, over all ranks, without waiting for the device."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_complement(self.shards)
        norm = self._gradient_norm() if self.shards.replicated else None
        self._engine.step()
        return self._engine.get_global_grad_norm() if norm is None else norm

    def _gradient_norm(self) -> torch.Tensor:
        norms = [torch.linalg.vector_norm(g, dtype=torch.float32) for g in self.shards.gradients()]
        return torch.linalg.vector_norm(torch.stack(norms))

    @torch.no_grad()
    def evaluate(self, batch: torch.Tensor) -> torch.Tensor:
        """Losses of this rank's (B, T) int64 blocks, (B,) fp32. Collective at stage 3: every rank
        brings equally many."""
        self._engine.eval()
        micro_batches = batch.to(self.device).split(self._micro_batch_size)
        return torch.cat([self.block_losses(micro_batch) for micro_batch in micro_batches])

    def parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Each parameter, whole, in global element order: on CPU in the training dtype on rank 0,
        empty on the others. Collective: every rank consumes it to the end."""
        for name, param in self._engine.module.named_parameters():
            partitioned = getattr(param, "ds_status", None) is not None
            with deepspeed.zero.GatheredParameters([param], enabled=partitioned):
                assert not partitioned or param.ds_status == ZeroParamStatus.AVAILABLE
                whole = param.detach().cpu().clone() if dist.rank() == 0 else torch.empty(0)
            yield name, whole

    def local_state(self, mask: ParamMask | None) -> dict[str, torch.Tensor]:
        """This rank's optimizer state in logical form, on CPU."""
        return collect(self.optimizer, self.shards, mask, master=self._sixteen_bit)

    def restore(self, mask: ParamMask | None, read: Read, step: int) -> None:
        """Take over the state after ``step`` updates; the weights are those of the model that the
        engine was built from."""
        restore(self.optimizer, self.shards, mask, read, step, master=self._sixteen_bit)
        self._engine.global_steps = step
        self._engine.micro_steps = step * self._engine.gradient_accumulation_steps()
        self._engine.global_samples = step * self._engine.train_batch_size()

    def close(self) -> None:
        """Free the engine, so that another can be built in this process."""
        self._engine.destroy()
        self.optimizer.state.clear()
        del self._engine, self.shards, self.optimizer
