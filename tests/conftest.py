"""Set before anything imports torch or the hub: no network, one thread, so that tests are alike on every machine."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"

import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("kdcache", deadline=None, derandomize=True, max_examples=30, print_blob=False)
settings.load_profile("kdcache")
