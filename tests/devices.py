"""Where things are tested: on the CPU, and on the GPU where there is one or, with REQUIRE_CUDA=1, must be one."""

import os

import torch

DEVICES = ["cpu"]
if torch.cuda.is_available() or os.environ.get("REQUIRE_CUDA") == "1":
    DEVICES.append("cuda")
