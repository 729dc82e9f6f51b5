"""Check tensors before the operators receive their addresses: a wrong length or type would read or
write other memory. Raises ValueError; never waits for a GPU."""

import torch

SIXTEEN_BIT = (torch.bfloat16, torch.float16)


def require(
    name: str,
    tensor: torch.Tensor,
    dtypes: tuple[torch.dtype, ...],
    numel: int | None,
    device: torch.device,
) -> None:
    """Require ``tensor`` to be contiguous, on ``device``, of one of ``dtypes`` and of ``numel``
    elements (None: any number)."""
    if tensor.dtype not in dtypes:
        found, *allowed = (str(each).removeprefix("torch.") for each in (tensor.dtype, *dtypes))
        raise ValueError(f"{name}: dtype {found}, needed {' or '.join(allowed)}")
    if tensor.device != device:
        raise ValueError(f"{name}: on {tensor.device}, needed on {device}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name}: not contiguous")
    if numel is not None and tensor.numel() != numel:
        raise ValueError(f"{name}: {tensor.numel()} elements, needed {numel}")


def packed(bits: torch.Tensor, numel: int, device: torch.device, start: int = 0) -> None:
    """Require ``bits`` to be packed and to cover elements ``start`` to ``start + numel``."""
    require("the packed mask", bits, (torch.uint8,), None, device)
    if bits.dim() != 1 or start < 0 or start + numel > 8 * bits.numel():
        raise ValueError(
            f"the packed mask of shape {list(bits.shape)} does not cover elements {start} to "
            f"{start + numel}"
        )


def step(
    weights: torch.Tensor,
    gradient: torch.Tensor,
    bits: torch.Tensor | None,
    prefix: torch.Tensor | None,
    compact: dict[str, torch.Tensor],  # by name: moments, and the master where there is one
    *,
    weight_dtypes: tuple[torch.dtype, ...],
    gradient_dtypes: tuple[torch.dtype, ...],
    block: int,
) -> None:
    """Require the arguments of one AdamW step to fit together."""
    numel, device = weights.numel(), weights.device
    require("the weights", weights, weight_dtypes, numel, device)
    require("the gradient", gradient, gradient_dtypes, numel, device)
    num_kept: int | None = numel
    if bits is not None:
        packed(bits, numel, device)
        if bits.numel() != (numel + 7) // 8 or prefix is None:
            raise ValueError(f"the packed mask of {numel} elements has {bits.numel()} bytes")
        require("the prefix", prefix, (torch.int64,), -(-8 * bits.numel() // block), device)
        num_kept = _num_kept(bits, prefix, block)
    for name, tensor in compact.items():
        require(name, tensor, (torch.float32,), num_kept, device)
        num_kept = tensor.numel()
    if num_kept is not None and num_kept > numel:
        raise ValueError(f"{num_kept} elements are kept of {numel}")


def _num_kept(bits: torch.Tensor, prefix: torch.Tensor, block: int) -> int | None:
    """Return the number of kept elements, counted in the last block alone.

    On a GPU, counting would wait for the device: None, and ``MaskedOptimizer.arm`` checked sizes.
    """
    if bits.device.type != "cpu":
        return None
    if not prefix.numel():
        return 0
    last = bits[(prefix.numel() - 1) * (block // 8) :].numpy().tobytes()
    return int(prefix[-1]) + int.from_bytes(last, "little").bit_count()
