"""Gradient counts against autograd by hand and against a plain computation over all elements."""

import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import nn

from pmp_ds.errors import UserError
from pmp_ds.evaluate.gradients import EDGES_LOG10, accumulate, compare
from pmp_ds.evaluate.subject import Subject
from pmp_ds.ticket.mask import ParamMask, pack
from tests.helpers import tiny


def test_by_hand():
    """Loss = sum of c * w, so the gradient is c."""
    toy = nn.Module()
    toy.w = nn.Parameter(torch.zeros(6))
    c = torch.tensor([0.0, 2e-3, -2e-3, 0.0, 0.2, 1e9])
    (c * toy.w).sum().backward()
    kept = torch.tensor([False, False, False, True, True, True])
    found = compare(toy, ParamMask(bits={"w": pack(kept)}, shapes={"w": (6,)}), frozenset({"w"}))
    assert found["zeros"] == {"ticket": 1, "complement": 1}
    assert found["elements"] == {"ticket": 3, "complement": 3}
    edges = found["edges_log10"]
    counted = {
        kind: {edges[i]: n for i, n in enumerate(found[kind]) if n}
        for kind in ("ticket", "complement")
    }
    assert counted == {"complement": {-2.75: 2}, "ticket": {-0.75: 1, 1.75: 1}}
    assert found["median"]["complement"] == pytest.approx(2e-3, rel=4e-3)
    assert found["median"]["ticket"] == pytest.approx(0.2, rel=4e-3)
    # of 9 pairs: 0 ties with 0 and loses to two; the other two win all
    assert found["auc"] == pytest.approx(6.5 / 9)
    assert found["auc_outside_embeddings"] is None


def test_of_a_model(subject: Subject, mask: ParamMask):
    blocks = tiny.batch(0, 5)
    other = tiny.model()
    other(input_ids=blocks, labels=blocks).loss.backward()
    accumulate(subject.model, blocks, batch_size=2)
    expected = dict(other.named_parameters())
    for name, param in subject.model.named_parameters():
        assert param.grad is not None
        torch.testing.assert_close(param.grad, expected[name].grad, rtol=1e-4, atol=1e-8)
    found = compare(subject.model, mask, subject.embeddings)
    assert subject.embeddings == {"model.embed_tokens.weight", "lm_head.weight"}
    for key, names in (
        ("auc", set(expected)),
        ("auc_outside_embeddings", set(expected) - subject.embeddings),
    ):
        scores, kept = [], []
        for name, param in subject.model.named_parameters():
            if name in names and param.grad is not None:
                scores.append(param.grad.abs().view(-1))
                kept.append(mask.full(name).view(-1))
        area = roc_auc_score(torch.cat(kept).numpy(), torch.cat(scores).numpy())
        assert found[key] == pytest.approx(area, abs=2e-4)
    for kind, count in (("ticket", mask.num_kept), ("complement", mask.num_params - mask.num_kept)):
        assert found["elements"][kind] == count == sum(found[kind]) + found["zeros"][kind]
        assert found["zeros"][kind] > 0  # rows of tokens that do not occur
    assert len(found["ticket"]) == len(EDGES_LOG10) - 1


def test_not_finite():
    toy = nn.Module()
    toy.w = nn.Parameter(torch.zeros(8))
    toy.w.grad = torch.full((8,), torch.nan)
    mask = ParamMask(bits={"w": pack(torch.arange(8) < 4)}, shapes={"w": (8,)})
    with pytest.raises(UserError, match="not finite"):
        compare(toy, mask, frozenset())
