"""A training under DeepSpeed on a CPU: gloo's all-gather writes into views, which autograd must not see."""

import sys

import torch
from deepspeed.comm.torch import TorchBackend

from caprl_utils.rl.train import main

gather = TorchBackend.all_gather_into_tensor
TorchBackend.all_gather_into_tensor = torch.no_grad()(gather)
sys.exit(main(sys.argv[1:]))
