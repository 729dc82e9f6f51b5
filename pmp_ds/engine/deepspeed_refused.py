"""DeepSpeed features that a masked run cannot use, each with the reason and the way out."""

import copy
from typing import Any

REFUSED = {
    "optimizer": "the optimizer is train.* in the recipe",
    "scheduler": "the schedule is train.lr, train.warmup_steps and train.min_lr_ratio",
    "data_types": "the recipe's train.precision decides",
    "amp": "the recipe's train.precision decides",
    "torch_autocast": "the recipe's train.precision decides",
    "bfloat16": "the section has an old name; rename it to bf16",
    "communication_data_type": "it rounds gradients; remove it",
    "seq_parallel_communication_data_type": "sequence parallelism is not supported; remove it",
    "sequence_parallel_size": "sequence parallelism is not supported; remove it",
    "tensor_parallel": "a mask is defined on whole parameters; use stage 3",
    "expert_parallel": "a mask is defined on whole parameters; use stage 3",
    "use_data_before_expert_parallelism": "expert parallelism is not supported; remove it",
    "pipeline": "pipeline parallelism is not supported; use stage 3",
    "prescale_gradients": "it changes how gradients are rounded; remove it",
    "gradient_predivide_factor": "it changes how gradients are rounded; remove it",
    "gradient_allreduce_op": "scores and clipping use the mean gradient; remove it",
    "managed_gradient_accumulation": "accumulation is the recipe's; remove it",
    "sparse_gradients": "the ticket needs dense gradients; remove it",
    "disable_allgather": "every rank needs all updated weights; remove it",
    "elasticity": "a run resumes on any number of ranks without it; remove it",
    "autotuning": "it starts runs of its own; tune by hand and remove it",
    "compression_training": "it changes weights outside the ticket; remove it",
    "quantize_training": "it changes weights outside the ticket; remove it",
    "weight_quantization": "it changes weights outside the ticket; remove it",
    "eigenvalue": "quantization is not supported; remove it",
    "progressive_layer_drop": "the recipe says what is learned; remove it",
    "curriculum_learning": "the order of the data is the recipe's; remove it",
    "data_efficiency": "the order of the data is the recipe's; remove it",
    "dataloader_drop_last": "the order of the data is the recipe's; remove it",
    "sparse_attention": "the architecture is the recipe's; remove it",
    "hybrid_engine": "it is for reinforcement learning; remove it",
    "compile": "DeepCompile is not tested with masked updates; remove it",
    "graph_harvesting": "captured graphs are not tested with masked updates; remove it",
    "activation_checkpointing": "transformers models ignore DeepSpeed's; set "
    "train.activation_checkpointing instead",
    "aio": "NVMe offload is not supported; remove it",
    "checkpoint": "checkpoints are run.* in the recipe; remove it",
    "nebula": "checkpoints are run.* in the recipe; remove it",
    "datastates_ckpt": "checkpoints are run.* in the recipe; remove it",
    "vocabulary_size": "the architecture is the recipe's; remove it",
    "zero_optimization.round_robin_gradients": "it breaks DeepSpeed's parameter mapping; remove it",
    "zero_optimization.elastic_checkpoint": "checkpoints here resume at any world size; remove it",
    "zero_optimization.zenflow": "masked updates are not defined for it; remove it",
    "zero_optimization.mics_shard_size": "MiCS is not supported; use stage 3",
    "zero_optimization.mics_hierarchical_params_gather": "MiCS is not supported; use stage 3",
    "zero_optimization.zeropp_loco_param": "it changes the gradients; remove it",
    "zero_optimization.zero_hpz_partition_size": "ZeRO++ is not supported; remove it",
    "zero_optimization.zero_quantized_gradients": "it changes the gradients; remove it",
    "zero_optimization.zero_quantized_weights": "it rounds the complement; remove it",
    "zero_optimization.zero_quantized_nontrainable_weights": "it rounds the complement; remove it",
    "zero_optimization.offload_optimizer.super_offload": "it brings its own optimizer; remove it",
    "bf16.bf16_master_weights_and_grads": "use pmp_ds.master instead",
    "bf16.bf16_optimizer_states": "use train.moments: bf16 instead",
    "fp16.fp16_master_weights_and_grads": "use pmp_ds.master instead",
    "fp16.loss_scale": "with a static loss scale a checkpoint would be incomplete; remove it or "
    "write 0",
}
_OFF = {
    "gradient_allreduce_op": "mean",
    "gradient_predivide_factor": 1,
    "sequence_parallel_size": 1,
    "zero_optimization.zero_hpz_partition_size": 1,
}
"""Values, by dotted name, that switch a feature off; they are accepted and left out."""


def problems(ds_config: dict[str, Any]) -> list[str]:
    """Return one line for each of these features that is switched on."""
    return [
        f"{name}: {reason}"
        for name, reason in REFUSED.items()
        if not _is_off(value := _lookup(ds_config, name)) and value != _OFF.get(name, "auto")
    ]


def _is_off(value: Any) -> bool:
    return not value or (isinstance(value, dict) and value.get("enabled") is False)


def without(ds_config: dict[str, Any]) -> dict[str, Any]:
    """Return a copy without these features: DeepSpeed may object to some even when switched off."""
    copied = copy.deepcopy(ds_config)
    for name in REFUSED:
        *sections, last = name.split(".")
        section = _lookup(copied, ".".join(sections)) if sections else copied
        if isinstance(section, dict):
            section.pop(last, None)
    return copied


def _lookup(ds_config: dict[str, Any], dotted: str) -> Any:
    value: Any = ds_config
    for key in dotted.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value
