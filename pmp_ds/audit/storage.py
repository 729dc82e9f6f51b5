"""Attacks on the storage of the release: number formats, and files that should not be in it."""

import torch

from pmp_ds.audit.attack import Attack, Finding
from pmp_ds.audit.case import Case
from pmp_ds.release.allow_list import is_release_file
from pmp_ds.release.rounding import BF16_BITS, Rounded, low_zeros
from pmp_ds.tensor_file import METADATA

_OF_OPTIMIZERS = ("exp_avg", "momentum", "optim", "master", "grad")


def dtypes(case: Case) -> Finding:
    """Detect fp32 weights partly rounded to bf16, which shows the part trained since."""
    kinds = {str(case.release.tensor(n).dtype).removeprefix("torch.") for n in case.release.shapes}
    if kinds != {"float32"}:
        return Finding(note=f"weights in {' and '.join(sorted(kinds))}", evidence=len(kinds) > 1)
    count = Rounded(BF16_BITS)
    for name in case.release.shapes:
        count.add(case.release.tensor(name))
    fine = case.gather(lambda name: _has_low_bits(case.release.tensor(name)))
    share = 1.0 - float(fine.mean())
    note = f"fp32 with 16 low bits of zero in {share:.3%} of the elements"
    return Finding(note=note, scores=fine, evidence=count.found_part)


def optimizer_files(case: Case) -> Finding:
    """Detect tensors and files of an optimizer: a moment of exactly zero was never trained."""
    known = set(case.release.shapes)
    extra = sorted(set(case.release.handles) - known - case.release.constants)
    moments = {
        name: tensor
        for name in known
        for tensor in extra
        if "exp_avg_sq" in tensor
        and name in tensor
        and tuple(case.release.handles[tensor].get_slice(tensor).get_shape())
        == case.release.shapes[name]
    }
    files = [
        str(path.relative_to(case.release.folder))
        for path in sorted(case.release.folder.rglob("*"))
        if any(word in path.name.lower() for word in _OF_OPTIMIZERS)
    ]
    tensors = [tensor for tensor in extra if any(word in tensor for word in _OF_OPTIMIZERS)]
    scores = None
    if moments.keys() == known:
        scores = case.gather(lambda name: case.release.tensor(moments[name]) != 0)
    found = [*files, *tensors]
    note = f"found {', '.join(found[:3])}{' ...' if found[3:] else ''}" if found else "none there"
    return Finding(note=note, scores=scores, evidence=bool(found))


def forbidden_files(case: Case) -> Finding:
    """Detect files beyond the allow-list, and tensors that the model does not have."""
    folder = case.release.folder
    names = [str(p.relative_to(folder)) for p in sorted(folder.rglob("*")) if p.is_file()]
    strange = [name for name in names if not is_release_file(name)]
    strange += sorted(set(case.release.handles) - set(case.release.shapes) - case.release.constants)
    for handle in {id(h): h for h in case.release.handles.values()}.values():
        keys = set(handle.metadata() or {}) - METADATA.keys()
        strange += [f"metadata {key}" for key in sorted(keys)]
    note = f"not allowed: {', '.join(strange[:5])}" if strange else f"{len(names)} files, all known"
    return Finding(note=note, evidence=bool(strange))


def _has_low_bits(stored: torch.Tensor) -> torch.Tensor:
    if stored.dtype != torch.float32:
        return torch.zeros_like(stored, dtype=torch.float32)
    return (~low_zeros(stored, BF16_BITS)).float()


ATTACKS = (
    Attack(
        name="dtype",
        needs="nothing",
        run=dtypes,
        preventable=True,
        countermeasure="one dtype, bf16; export refuses fp32 of bf16 runs",
        use_quota=False,
    ),
    Attack(
        name="optimizer files",
        needs="one mistake",
        run=optimizer_files,
        preventable=True,
        countermeasure="allow-list of files and tensors",
        use_quota=False,
    ),
    Attack(
        name="forbidden files",
        needs="one mistake",
        run=forbidden_files,
        preventable=True,
        countermeasure="allow-list of files and tensors",
        use_quota=False,
    ),
)
