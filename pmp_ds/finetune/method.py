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

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pmp_ds.finetune.config import FinetuneConfig
    from pmp_ds.model.parameters import ParamInfo
    from pmp_ds.ticket.mask import ParamMask
    from pmp_ds.ticket.ticket import Ticket

    Table = Sequence[ParamInfo]
    Kept = tuple[ParamMask, str] | None
    Facts = Mapping[str, Callable[[FinetuneConfig], Any]]


class Role(Enum):
    """What a method trains with, in the order of a report's tables."""

    ATTACK = "the release alone"
    AUTHORIZED = "the model's own ticket"
    GUESS = "a random mask of the ticket's density"
    RECOVERED = "a mask that an attack recovered"
    CONTROL = "what no recipient and no attacker would use"


def _all(config: "FinetuneConfig", ticket: "Ticket | None", model: Any) -> "Kept":
    return None


def _as_it_is(model: Any, config: "FinetuneConfig", has_head: bool) -> Any:
    return model


@dataclass(frozen=True, kw_only=True)
class Method:
    """A method's name, permissions and functions."""

    name: str
    title: str
    """In tables."""

    role: Role = Role.ATTACK
    """What a report compares it as."""

    needs_ticket: bool = False

    from_scratch: bool = False
    """Whether it also applies to fresh weights."""

    adapt: Callable[[Any, "FinetuneConfig", bool], Any] = _as_it_is
    """Makes the model to train from the released one and whether that has a head. May raise
    UserError, and is tried before the first cell of a sweep begins."""

    kept: Callable[["FinetuneConfig", "Ticket | None", Any], "Kept"] = _all
    """Returns the mask to train and its id; None: all trainable elements. Collective."""

    facts: "Facts" = field(default_factory=dict)
    """Its own settings by name, as results record them."""

    @property
    def adapts(self) -> bool:
        return self.adapt is not _as_it_is


def _adapters(model: Any, config: "FinetuneConfig", has_head: bool) -> Any:
    from pmp_ds.finetune.methods import with_adapters

    return with_adapters(model, config, has_head)


def _lora_settings(config: "FinetuneConfig") -> dict[str, Any]:
    return asdict(config.lora) | {"targets": list(config.lora.targets)}


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


def _mask_name(config: "FinetuneConfig") -> str:
    return config.mask_name


FULL = Method(name="full", title="Full fine-tuning", from_scratch=True)
_ALL = (
    FULL,
    Method(name="lora", title="LoRA", adapt=_adapters, facts={"lora": _lora_settings}),
    Method(
        name="ticket",
        title="With the true mask (authorized)",
        role=Role.AUTHORIZED,
        needs_ticket=True,
        kept=_ticket,
        facts={"mask": _mask_name},
    ),
    Method(
        name="random",
        title="With a random mask",
        role=Role.GUESS,
        from_scratch=True,
        kept=_random,
        facts={"density": lambda config: config.density},
    ),
    Method(
        name="complement",
        title="Complement only",
        role=Role.CONTROL,
        needs_ticket=True,
        kept=_complement,
        facts={"mask": _mask_name},
    ),
)

METHODS: dict[str, Method] = {method.name: method for method in _ALL}
RECOVERED = Method(name="recovered", title="With a recovered mask", role=Role.RECOVERED)
"""What a report counts runs as that trained with another mask than the model's own."""


def reported(*roles: Role) -> list[Method]:
    """Return the methods with one of ``roles``, or all of them, in the order of tables."""
    return [m for role in roles or Role for m in (*METHODS.values(), RECOVERED) if m.role is role]
