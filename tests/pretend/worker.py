"""A rank on the pretend device: tests/helpers/rank_worker.py, with the device loaded before torch.

RankPool starts it with PRETEND_DEVICE, the compiled device, in its environment.
"""

import os

from tests.helpers import rank_worker
from tests.pretend.device import cuda

if __name__ == "__main__":
    cuda.load(os.environ["PRETEND_DEVICE"])
    cuda.install(int(os.environ["WORLD_SIZE"]))
    from tests.pretend.device import accelerator, kernels, nccl

    nccl.install()
    accelerator.install()
    kernels.install()
    rank_worker.main()
