"""The policy: one language model that samples, scores and learns."""

import os

import torch

# Where DeepSpeed is installed, transformers loads it, and it prints a guess at every start unless it is told.
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
