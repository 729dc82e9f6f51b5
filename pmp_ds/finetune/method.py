"""The methods of fine-tuning, each with everything that differs between them.

| method | trains |
|---|---|
| full | everything |
| lora | adapters of `peft`, and the head |
| ticket | the ticket, and the head (authorized) |
| random | a random mask of the ticket's density, and the head |
| complement | everything except the ticket, and the head |

A new method is a ``Method`` in ``METHODS``. Nothing here imports torch before a model is made.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pmp_ds.finetune.config import FinetuneConfig
    from pmp_ds.model.parameters import ParamInfo
    from pmp_ds.ticket.mask import ParamMask
    from pmp_ds.ticket.ticket import Ticket

    Table = Sequence[ParamInfo]
    Kept = tuple[ParamMask, str] | None


def _all(config: "FinetuneConfig", ticket: "Ticket | None", model: Any) -> "Kept":
    return None


def _as_it_is(model: Any, config: "FinetuneConfig", has_head: bool) -> Any:
    return model


def _nothing(config: "FinetuneConfig") -> dict[str, Any]:
    return {}


@dataclass(frozen=True, kw_only=True)
class Method:
    """A method's name, permissions and functions."""

    name: str
    title: str
    """In tables."""

    authorized: bool = False
    """Whether it trains with the model's own ticket."""

    control: bool = False
    """Whether it is a control that no recipient or attacker would use."""

    needs_ticket: bool = False

    from_scratch: bool = False
    """Whether it also applies to fresh weights."""

    adapt: Callable[[Any, "FinetuneConfig", bool], Any] = _as_it_is
    """Makes the model to train from the released one and whether that has a head. May raise
    UserError, and is tried before the first cell of a sweep begins."""

    kept: Callable[["FinetuneConfig", "Ticket | None", Any], "Kept"] = _all
    """Returns the mask to train and its id; None: all trainable elements. Collective."""

    facts: Callable[["FinetuneConfig"], dict[str, Any]] = _nothing
    """Returns its own settings, as results record them."""

    @property
    def adapts(self) -> bool:
        return self.adapt is not _as_it_is


def _adapters(model: Any, config: "FinetuneConfig", has_head: bool) -> Any:
    from pmp_ds.finetune.methods import with_adapters

    return with_adapters(model, config, has_head)


def _lora_facts(config: "FinetuneConfig") -> dict[str, Any]:
    return {"lora": asdict(config.lora) | {"targets": list(config.lora.targets)}}


def _ticket(config: "FinetuneConfig", ticket: "Ticket | None", model: Any) -> "Kept":
    from pmp_ds.finetune.methods import with_head

    assert ticket is not None
    return with_head(ticket.mask, model), ticket.id


def _complement(config: "FinetuneConfig", ticket: "Ticket | None", model: Any) -> "Kept":
    from pmp_ds.finetune.methods import with_head

    assert ticket is not None
    return with_head(ticket.mask, model, inverted=True), ticket.id


def _random(config: "FinetuneConfig", ticket: "Ticket | None", model: Any) -> "Kept":
    from pmp_ds.finetune.methods import random_mask, with_head

    drawn = random_mask(config, model)
    return with_head(drawn.mask, model), drawn.id


def _mask_name(config: "FinetuneConfig") -> dict[str, Any]:
    return {"mask": config.mask_name}


_ALL = (
    Method(name="full", title="Full fine-tuning", from_scratch=True),
    Method(name="lora", title="LoRA", adapt=_adapters, facts=_lora_facts),
    Method(
        name="ticket",
        title="With the true mask (authorized)",
        authorized=True,
        needs_ticket=True,
        kept=_ticket,
        facts=_mask_name,
    ),
    Method(
        name="random",
        title="With a random mask",
        control=True,
        from_scratch=True,
        kept=_random,
        facts=lambda config: {"density": config.density},
    ),
    Method(
        name="complement",
        title="Complement only",
        control=True,
        needs_ticket=True,
        kept=_complement,
        facts=_mask_name,
    ),
)

METHODS: dict[str, Method] = {method.name: method for method in _ALL}
UNAUTHORIZED = tuple(m.name for m in _ALL if not (m.authorized or m.control))
"""The methods of an attacker who has only the release."""
