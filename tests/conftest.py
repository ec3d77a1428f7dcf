"""One thread, no network, and small models that the tests make themselves."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"

import torch

torch.set_num_threads(1)
