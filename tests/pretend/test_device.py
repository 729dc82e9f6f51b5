"""The pretend device itself: faults that are planted are found, and a clean program reports
nothing. Every `check_` runs in a process that has the device."""

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import embedding, scaled_dot_product_attention

from pmp_ds.optim.kernels import compiler
from tests.helpers.distributed import RankPool
from tests.pretend.device import build
from tests.pretend.device.findings import Watched, watch

pytestmark = [pytest.mark.pretend, pytest.mark.distributed]

SIZE = 1000


def kinds(watched: Watched) -> list[str]:
    return [finding.kind for finding in watched.findings]


def check_results_are_those_of_the_cpu() -> None:
    a, b = torch.randn(7, 5), torch.randn(5, 3)
    x, y = a.cuda(), b.cuda()
    assert (x @ y).device == torch.device("cuda", 0)
    assert torch.equal((x @ y).cpu(), a @ b)
    assert torch.equal((x * 2 + 1).sum(0).cpu(), (a * 2 + 1).sum(0))
    assert torch.equal(torch.cat([x, x.flip(0)]).cpu(), torch.cat([a, a.flip(0)]))
    values, places = x.sort(dim=1)
    assert torch.equal(values.cpu(), a.sort(dim=1).values)
    assert places.is_cuda
    for given, made in ((a, a.bfloat16()), (a.double(), a)):
        assert torch.equal(given.cuda().to(made.dtype).cpu(), given.to(made.dtype))


def check_views_share_memory_and_storages_grow() -> None:
    x = torch.zeros(4, 5, device="cuda")
    x.view(-1)[3:7] = 1.0
    assert x.flatten()[2:8].tolist() == [0, 1, 1, 1, 1, 0]
    x.resize_(6, 5)
    assert x.untyped_storage().nbytes() == 120
    assert x.flatten()[3:7].tolist() == [1] * 4
    out = torch.empty(0, device="cuda")
    torch.add(x, 1.0, out=out)
    assert out.shape == (6, 5)
    assert out[0, 3] == 2.0
    window = torch.empty(0, device="cuda").set_(x.untyped_storage(), 3, (4,), (1,))
    window.fill_(5.0)
    assert x.flatten()[2:8].tolist() == [0, 5, 5, 5, 5, 0]


def check_training_a_module_with_tied_weights_gives_the_same_bits() -> None:
    def train(device: str) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = nn.ModuleList([nn.Embedding(11, 6), nn.LayerNorm(6), nn.Linear(6, 11, bias=False)])
        model[2].weight = model[0].weight
        model.to(device)
        assert model[2].weight is model[0].weight
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        tokens = torch.tensor([1, 4, 2, 8, 5, 7], device=device)
        for _ in range(3):
            optimizer.zero_grad()
            logits = model[2](model[1](model[0](tokens)))
            nn.functional.cross_entropy(logits[:-1], tokens[1:]).backward()
            optimizer.step()
        return [parameter.detach().cpu() for parameter in model.parameters()]

    for here, there in zip(train("cpu"), train("cuda"), strict=True):
        assert torch.equal(here, there)


def check_attention_is_one_launch_each_way() -> None:
    x = torch.randn(2, 3, 16, 8, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    with watch() as watched:
        out = scaled_dot_product_attention(x, x, x, is_causal=True)
        assert watched.launches == 1
    out.sum().backward()
    y = x.detach().cpu().requires_grad_()
    scaled_dot_product_attention(y, y, y, is_causal=True).sum().backward()
    assert x.grad is not None
    assert y.grad is not None
    assert torch.equal(x.grad.cpu(), y.grad)


def check_every_wait_is_found_at_its_line() -> None:
    x, pinned = torch.arange(6.0, device="cuda"), torch.zeros(6).pin_memory()
    causes: list[tuple[Callable[[], object], str]] = [
        (lambda: x.sum().item(), "item"),
        (lambda: bool(x[0] == 0), "item"),
        (lambda: x.nonzero().sum(), "nonzero"),
        (lambda: x[x > 2], "index with a mask"),
        (lambda: x[torch.tensor([0, 2])], "index with indices on the CPU"),
        (lambda: x.masked_select(x > 2), "masked_select"),
        (lambda: x.cpu().sum(), "copy to the host, pageable memory"),
        (lambda: torch.ones(6).copy_(x, non_blocking=True), "copy to the host, pageable memory"),
        (lambda: torch.ones(6).to("cuda", non_blocking=True), "copy to the device, pageable"),
        (lambda: torch.tensor(1.0, device="cuda"), "copy to the device, pageable memory"),
        (lambda: pinned.copy_(x), "copy to the host, blocking"),
        (lambda: pinned.to("cuda"), "copy to the device, blocking"),
        (lambda: x.copy_(pinned.double().pin_memory(), non_blocking=True), "converted on the host"),
        (lambda: torch.cuda.synchronize(x.device), "torch.cuda.synchronize"),
        (lambda: torch.cuda.current_stream().synchronize(), "Stream.synchronize"),
        (lambda: x.add(1) is torch.cuda.current_stream().record_event().synchronize(), "Event"),
        (lambda: torch.segment_reduce(x, "sum", lengths=torch.tensor([6]).cuda()), "segment"),
    ]
    for cause, what in causes:
        with watch() as watched:
            cause()
        assert any(what in f.what for f in watched.of("wait")), (what, watched.findings)
        assert set(kinds(watched)) == {"wait"}
        line = cause.__code__.co_firstlineno
        assert {f.place for f in watched.findings} == {f"tests/pretend/test_device.py:{line}"}
        assert {f.owner for f in watched.findings} == {"tests"}


def check_a_clean_program_reports_nothing() -> None:
    side, pinned = torch.cuda.Stream(), torch.zeros(SIZE).pin_memory()
    with watch() as watched:
        x = torch.zeros(SIZE, device="cuda").add_(1.0)
        x.where(x > 1, 0.0)
        x + torch.tensor(1.0)  # as CUDA: a CPU tensor without dimensions
        x.index_select(0, torch.arange(3, device="cuda"))
        lengths = torch.full((1,), SIZE, device="cuda")
        torch.segment_reduce(x, "sum", lengths=lengths, unsafe=True)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            x.mul_(2.0)
            pinned.copy_(x, non_blocking=True)
            event = torch.cuda.current_stream().record_event()
        x.record_stream(side)
        torch.cuda.current_stream().wait_stream(side)
        x.sum()
        pinned.to("cuda", non_blocking=True)
        assert event.query()
        del x
    assert watched.findings == []
    assert watched.launches > 8


def check_a_wait_that_leaves_the_device_work_is_another_kind() -> None:
    x, event = torch.ones(SIZE, device="cuda"), torch.cuda.Event()
    x.add_(1)
    event.record()
    x.add_(1)
    with watch() as watched:
        event.synchronize()
        event.synchronize()  # it is over already
    assert kinds(watched) == ["late"]
    event.record()
    with watch() as watched:
        event.synchronize()
    assert kinds(watched) == ["wait"]


def check_mixed_devices_are_refused_and_reported() -> None:
    x = torch.ones(3, 3, device="cuda")
    causes: list[tuple[Callable[[], object], str]] = [
        (lambda: x + torch.ones(3), "at least two devices, cuda:0 and cpu"),
        (lambda: x @ torch.ones(3, 3), "mat2 is on cpu"),
        (lambda: x.index_select(0, torch.tensor([0])), "index is on cpu"),
        (lambda: torch.ones(3).add_(x[0]), "cuda:0 and cpu"),
        (lambda: embedding(torch.tensor([1]), x), "index is on cpu"),
        (lambda: torch.cat([x, torch.ones(3, 3)]), "is on cpu"),
    ]
    for cause, what in causes:
        with watch() as watched, pytest.raises(RuntimeError, match=what):
            cause()
        assert kinds(watched) == ["device"]
        assert what in watched.findings[0].what


def check_a_race_is_found_and_an_event_mends_it() -> None:
    side = torch.cuda.Stream()
    for ordered in (True, False):
        with watch() as watched:
            x = torch.zeros(SIZE, device="cuda").add_(1.0)
            if ordered:
                event = torch.cuda.Event()
                event.record()
                side.wait_event(event)
            with torch.cuda.stream(side):
                x.mul_(2.0)
            torch.cuda.current_stream().wait_stream(side)
            x.sum()
        assert set(kinds(watched)) == (set() if ordered else {"race"})
    assert "mul_ writes on stream" in watched.findings[-1].what
    assert "add_ writes on stream 0" in watched.findings[-1].what


def check_halves_and_reads_do_not_race() -> None:
    side, x = torch.cuda.Stream(), torch.zeros(SIZE, device="cuda")
    side.wait_stream(torch.cuda.current_stream())
    with watch() as watched:
        x[: SIZE // 2].add_(1.0)
        with torch.cuda.stream(side):
            x[SIZE // 2 :].add_(1.0)
    assert kinds(watched) == []
    torch.cuda.synchronize()
    with watch() as watched:
        x.sum()
        with torch.cuda.stream(side):
            x.sum()
    assert kinds(watched) == []


def check_autograd_orders_its_streams() -> None:
    side, w = torch.cuda.Stream(), torch.ones(8, device="cuda", requires_grad=True)
    with watch() as watched:
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            loss = (w * 3).sum()
        torch.cuda.current_stream().wait_stream(side)
        (loss * 2).backward()
        assert w.grad is not None
        w.grad.mul_(2)
    assert watched.of("race") == []
    assert w.grad.tolist() == [12.0] * 8


def check_memory_that_another_stream_uses_must_be_recorded() -> None:
    side = torch.cuda.Stream()
    for recorded in (True, False):
        with watch() as watched:
            x = torch.ones(SIZE, device="cuda")
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                x.sum()
            if recorded:
                x.record_stream(side)
            del x
        assert kinds(watched) == ([] if recorded else ["lifetime"])
    assert "sum on stream" in watched.findings[0].what


def check_a_copy_to_pinned_memory_arrives_when_it_is_waited_for() -> None:
    x, pinned = torch.full((5,), 7.0, device="cuda"), torch.zeros(5).pin_memory()
    pinned.copy_(x, non_blocking=True)
    x.zero_()  # later on the same stream
    assert pinned.tolist() == [0.0] * 5
    assert pinned.to("cuda", non_blocking=True).sum() == 35.0  # the device sees its own copy
    assert pinned.tolist() == [7.0] * 5  # `==` waited


def check_pinned_memory_must_not_change_under_a_copy() -> None:
    for waits in (True, False):
        pinned = torch.zeros(5).pin_memory()
        with watch() as watched:
            pinned.to("cuda", non_blocking=True)
            if waits:
                torch.cuda.synchronize()
            pinned.add_(1.0)
            torch.cuda.synchronize()
        assert len(watched.of("race")) == (not waits)


def check_new_memory_is_nan() -> None:
    assert torch.empty(SIZE, device="cuda").isnan().all()


def check_launches_bytes_and_peak() -> None:
    x = torch.zeros(1024, device="cuda")
    with watch() as watched:
        before = watched.bytes_held
        y = x + 1.0
        assert (watched.launches, watched.bytes_moved) == (1, 2 * 4096)
        x.view(32, 32).t().unsqueeze(0)
        torch.empty(10, device="cuda")
        assert watched.launches == 1
        y.add_(x)
        assert watched.bytes_moved == (2 + 3) * 4096
        rows = x.view(32, 32)[torch.arange(2, device="cuda")]
        assert watched.bytes_moved == 5 * 4096 + 16 + 16 + 2 * rows.nbytes
        torch._foreach_add_([x, y], 1.0)
        assert watched.launches == 2 + 2 + 1
        del rows, y
        assert watched.bytes_held == before
        assert watched.peak_bytes == before + 4096 + 2 * 512  # y; two rows and their numbers


def check_the_masked_step_is_counted_at_its_kept_elements() -> None:
    from pmp_ds.optim.masked_adamw import MaskedAdamW
    from pmp_ds.ticket.mask import pack

    def step(device: str) -> torch.Tensor:
        torch.manual_seed(0)
        weights = torch.randn(2048).to(device).requires_grad_()
        weights.grad = torch.randn(2048).to(device)
        optimizer = MaskedAdamW([weights], lr=0.1, betas=(0.9, 0.9), eps=1e-8, weight_decay=0.0)
        optimizer.arm({weights: pack(torch.arange(2048) % 2 == 0).to(device)})
        with watch() as watched:
            optimizer.step()
        assert kinds(watched) == []
        if device == "cuda":
            tables = 2 * (4 + 8 + 8 + 4) + (8 * 8 + 3 * 8 + 10 * 4)
            kept = 1024 * (4 + 3 * 2 * 4)
            copies = 2 * (8 * 8 + 10 * 4)  # addresses and coefficients from the host
            factor = 4
            moved = watched.bytes_moved - copies // 2 - factor
            assert moved == tables + kept + 2048 // 8, moved
            assert watched.launches == 1 + 2 + 1
        return weights.detach().cpu()

    assert torch.equal(step("cpu"), step("cuda"))


def check_collectives_are_nccls() -> None:
    """On two ranks."""
    rank = dist.get_rank()
    device = torch.device("cuda", rank)
    with watch() as watched:
        x = torch.full((4,), 1.0 + rank, device=device)
        dist.all_reduce(x)
        both = torch.empty(8, device=device)
        handle = dist.all_gather_into_tensor(both, x, async_op=True)
        handle.wait()
        both.add_(1.0)
    assert kinds(watched) == []
    assert both.tolist() == [4.0] * 8
    with watch() as watched:
        handle = dist.all_reduce(x, async_op=True)
        x.add_(1.0)  # without waiting
        handle.wait()
    assert watched.of("race")
    side = dist.new_group(backend="gloo")
    dist.all_reduce(torch.ones(1), group=side)
    for tensor, group in ((torch.ones(1), None), (x, side)):
        with watch() as watched, pytest.raises(RuntimeError, match="no backend"):
            dist.all_reduce(tensor, group=group)
        assert kinds(watched) == ["device"]
    with watch() as watched:
        dist.all_gather_object([None, None], rank)
        dist.all_gather_object([None, None], rank, group=side)
        dist.barrier()
    assert [f.what for f in watched.findings] == [
        "all_gather_object over NCCL",
        "barrier over NCCL",
    ]


CHECKS = {
    name.removeprefix("check_"): check
    for name, check in list(globals().items())
    if name.startswith("check_") and check is not check_collectives_are_nccls
}


@pytest.mark.parametrize("name", CHECKS)
def test_one_device(pretend1: RankPool, name: str) -> None:
    pretend1.run(CHECKS[name])


def test_without_a_compiler_there_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "_compiler", lambda: None)
    with pytest.raises(build.Unavailable, match="needs a C\\+\\+ compiler, and there is none"):
        build.program.__wrapped__()


def test_two_ranks(pretend2: RankPool) -> None:
    pretend2.run(check_collectives_are_nccls)
