"""What every process of tests/helpers/forks.py has imported when it begins."""

import pytest  # noqa: F401
import torch._inductor.config  # by torch.use_deterministic_algorithms
import torch.distributed.tensor  # noqa: F401  by torch.distributed.init_process_group
from transformers.models.gpt2 import modeling_gpt2  # noqa: F401
from transformers.models.llama import modeling_llama  # noqa: F401

import pmp_ds.finetune.sweep
import pmp_ds.lifeline
import pmp_ds.meeting
import pmp_ds.plots
import pmp_ds.ranks
import pmp_ds.train.job
import pmp_ds.train.pipeline  # noqa: F401
from pmp_ds.dist import import_deepspeed

import_deepspeed()
