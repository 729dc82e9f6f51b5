"""The memory of each phase of a run, per rank and by category, on the device and in host memory.

    phases.on_device(budget, timeline)             by phase
    phases.update(budget, timeline, sequences)     the peak of an update
    phases.host(budget, "save")                    in host memory

As in DeepSpeed 0.19.8. What Python, torch and CUDA take for themselves does not count.
"""

from pmp_ds.config.moments import moments_of
from pmp_ds.config.precision import precision_of
from pmp_ds.engine.deepspeed_config import master_of
from pmp_ds.optim.rules import rule_of
from pmp_ds.optim.stored import CHUNK
from pmp_ds.state.weight_files import Layout
from pmp_ds.ticket.scores import find_score
from pmp_ds.train.activations import Timeline
from pmp_ds.train.budget import Budget, Bytes

_STAGE0_BUCKET = 500_000_000  # elements
_CHUNK = 1 << 22  # elements of theta(0) drawn at once
_SPLIT = 24  # bytes per element of a chunk while master weights are split
_DRAW = 24  # bytes per element while they are drawn: bits, uniforms, results


def on_device(budget: Budget, timeline: Timeline | None) -> dict[str, Bytes]:
    """Return the peak of each phase on the device, by category."""
    size, (between, _) = budget.cut.micro_batch_size, budget.placed(budget.states())
    piece = budget.element * budget.largest * (budget.stage == 3)
    found = {
        "start": start(budget),
        "discovery": update(budget, timeline, size, dense=True),
        "training": update(budget, timeline, size),
        "save": between | {"gathered parameters": piece, "gradients": 0},
        "resume": start(budget, resumed=True),
    }
    if budget.config.mask.source != "earlybird":
        del found["discovery"]
    return found


def _buckets(budget: Budget) -> int:
    """Return the bytes of DeepSpeed's communication buffers, and copies of them."""
    size = int(budget.zero["reduce_bucket_size"])
    size = min(size, budget.num_params) if budget.on_cpu else size
    if budget.stage == 0:
        return budget.element * min(budget.num_params, _STAGE0_BUCKET + budget.largest)
    number = 1 + (budget.stage < 3 and bool(budget.zero.get("overlap_comm"))) + (budget.world > 1)
    if budget.offloads("optimizer") and budget.stage < 3:
        return budget.element * (number * size + budget.largest)
    return budget.element * number * size


def _gathered(budget: Budget) -> int:
    """Return the bytes of gathered parameters at stage 3, at most."""
    if budget.stage < 3:
        return 0
    # What the backward pass needs again so soon stays from the forward pass.
    near = int(budget.zero["stage3_max_reuse_distance"]) // 2
    ahead = int(budget.zero["stage3_prefetch_bucket_size"]) + budget.largest
    return budget.element * min(budget.num_params, budget.persistent + near + ahead)


def update(
    budget: Budget, timeline: Timeline | None, sequences: int, *, dense: bool = False
) -> Bytes:
    """Return the peak of an update on the device with so many sequences per micro-batch, by
    category; ``dense``: of an update of discovery. Without a timeline no activations count."""
    found, _ = budget.placed(budget.states(dense=dense))
    full, buckets = found["gradients"], _buckets(budget)
    static = budget.stage == 3 or budget.cut.accumulation_steps > 1
    each = 0.0 if static else full / budget.num_params
    peak = timeline.peak(sequences, each) if timeline else 0
    activations = max(peak - (0 if static else full), 0)
    if budget.stage < 2:  # they are filled when the backward pass is over
        buckets = max(buckets - activations, 0)
    found |= {"gathered parameters": _gathered(budget), "communication buckets": buckets}
    if dense and not budget.offloads("optimizer"):
        found["scores and candidates"] = _scores(budget)
    return found | {"activations, logits": activations}


def _scores(budget: Budget) -> int:
    stored = find_score(budget.config.mask.score).add is not None
    candidates = 3 + (budget.config.mask.random_fraction > 0)  # newest, last, best; drawn
    return budget.local * 4 * stored + candidates * -(-budget.local // 8)


def start(budget: Budget, *, resumed: bool = False) -> Bytes:
    """Return the peak on the device while the engine is built and, with ``resumed``, its state
    restored."""
    states = budget.states()
    found, host = budget.placed(states)
    found["gradients"] = found["gradients"] if budget.stage == 3 else 0
    ready = sum(found.values())
    wrapped = budget.stage > 0 or precision_of(budget.config.train).has_master
    piece = budget.local
    if budget.stage == 3:
        piece = min(piece, int(budget.zero["sub_group_size"]))
    # DeepSpeed copies the weights to one tensor; then it makes fp32 masters, and gradients of 0. A
    # compact or split master takes the place of a dense one, then moments are made.
    peaks = [ready, found["weights"] * (2 if 0 < budget.stage < 3 else 1)]
    if wrapped and not host:
        peaks.append(found["weights"] + found["gradients"] + 4 * budget.local + 4 * piece)
    if not host and (found["master weights"] not in (0, 4 * budget.local)):
        splitting = master_of(dict(budget.ds_config)) == "split"
        chunk = _SPLIT * min(piece, CHUNK) * splitting
        peaks.append(ready - found["moments"] + 4 * budget.local + chunk)
    if resumed and not host:
        peaks.append(ready + 5 * min(piece, budget.largest))
    return found | {"while it is built": max(peaks) - ready}


def host(budget: Budget, phase: str, *, drawn_whole: bool = False) -> Bytes:
    """Return the bytes in host memory in a phase of the run."""
    dense = phase == "discovery"
    _, found = budget.placed(budget.states(dense=dense))
    if dense and budget.offloads("optimizer"):
        found["scores and candidates"] = _scores(budget)
    if phase in ("start", "resume"):
        if budget.offloads("optimizer") and budget.stage < 3:
            found["gradients"] = 4 * budget.local  # those that accumulate come with an update
        size = 4 * budget.num_params if drawn_whole else _DRAW * min(_CHUNK, budget.largest)
        found["theta(0), drawn" if phase == "start" else "checkpoint, read"] = size
    if phase == "save":
        found |= _staged(budget)
    return found


def _staged(budget: Budget) -> Bytes:
    """Return the copies that a save makes on the rank with the largest share."""
    layout = Layout.of({n: s * budget.element for n, s in budget.sizes.items()}, budget.world)
    files = [sum(budget.sizes[name] for name in names) for names in layout.files]
    # In the background all files of a rank are in memory, otherwise one at a time.
    writers = budget.world if budget.config.run.async_save else len(files)
    shares = [sum(files[rank::writers]) for rank in range(min(writers, len(files)))]
    states, has_master = budget.states(), precision_of(budget.config.train).has_master
    copied = states["moments"] + (states["master weights"] if has_master else 0)
    kept = budget.kept if budget.masked else budget.num_params
    kept //= 1 if budget.stage == 0 else budget.world
    # Dense masters are written without the complement, 8-bit moments as bf16.
    made = 4 * kept if has_master and master_of(dict(budget.ds_config)) == "dense" else 0
    if moments_of(budget.config.train).has_exponents:
        made += 2 * kept * len(rule_of(budget.config.train).moments)
    return {"staged weights": budget.element * max(shares), "staged state": copied + made}
