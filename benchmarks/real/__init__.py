"""`make real`: a pre-trained model from the package index, trained with GRPO and PPO on a CPU."""
