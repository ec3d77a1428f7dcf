"""Supervised learning: SFT, reward models, DPO, and the tiny base model of the examples."""
