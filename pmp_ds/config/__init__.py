"""The configuration tree: what is learned. How it fits on the machine is in ds_configs/*.json.

Every field's docstring becomes its line in ``--help``. Checks here need no file, network or
process group; what needs them is checked where it is opened.
"""

from dataclasses import dataclass, field

from pmp_ds.config.mask import MaskConfig
from pmp_ds.config.model import DataConfig, InitConfig, ModelConfig, check_store
from pmp_ds.config.run import GuardConfig, RunConfig
from pmp_ds.config.train import TrainConfig
from pmp_ds.errors import require

__all__ = [
    "Config",
    "DataConfig",
    "GuardConfig",
    "InitConfig",
    "MaskConfig",
    "ModelConfig",
    "RunConfig",
    "TrainConfig",
    "check_store",
]


@dataclass(frozen=True, kw_only=True)
class Config:
    """One pretraining run."""

    run: RunConfig = field(default_factory=RunConfig)
    init: InitConfig = field(default_factory=InitConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    mask: MaskConfig = field(default_factory=MaskConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)

    def __post_init__(self) -> None:
        require(
            self.model.family != "auto"
            or self.model.path is not None
            or self.init.weights is not None,
            "model.family=auto needs a config.json that describes the model: set model.path, or "
            "init.weights to start from the weights of a folder",
        )
        require(
            not self.data.separate_documents or self.model.family != "auto",
            "data.separate_documents=true needs model.family=llama or gpt2: not every architecture "
            "of model.family=auto can keep documents apart",
        )
