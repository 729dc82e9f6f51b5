"""The early-bird test for a stable candidate mask (paper, section 2.1, Eq. 3 and 4)."""

from dataclasses import dataclass, field


@dataclass
class EarlyBird:
    """Follows the IoU of consecutive candidate masks until ``patience`` values in a row suffice.

    ``trace[i]`` is the IoU of candidates i+1 and i+2 (updates count from 1).
    """

    iou_threshold: float
    patience: int
    trace: list[float] = field(default_factory=list)
    streak: int = 0

    def observe(self, iou: float) -> bool:
        """Add the newest IoU and return ``stable``."""
        self.trace.append(iou)
        self.streak = self.streak + 1 if iou >= self.iou_threshold else 0
        return self.stable

    @property
    def stable(self) -> bool:
        """Whether the newest candidate is the ticket."""
        return self.streak >= self.patience

    @property
    def best_so_far(self) -> bool:
        """Whether the newest candidate has the highest IoU so far; of equals, the first."""
        return bool(self.trace) and self.trace[-1] > max(self.trace[:-1], default=-1.0)
