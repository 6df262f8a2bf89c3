"""What holds for every test: one thread, and hypothesis without a clock."""

import os

import torch
from hypothesis import HealthCheck, settings

# Drawing a tensor is slow on a loaded machine, and that is no fault of the law under test.
settings.register_profile("ffr", deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ffr-ci", settings.get_profile("ffr"), derandomize=True)
settings.load_profile("ffr-ci" if os.environ.get("CI") else "ffr")

# Small tensors lose more in hand-over between threads than they gain; it also makes sums repeatable.
torch.set_num_threads(1)
