"""Check tensors before the operators receive their addresses: a wrong length or type would read or
write other memory. Raises ValueError; never waits for a GPU."""

import torch


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
