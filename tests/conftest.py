"""Every test is small: one thread each is the fastest, and leaves a busy machine its other cores."""

import torch

torch.set_num_threads(1)
