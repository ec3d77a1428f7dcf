"""PPO and GRPO for language models, from scratch in raw PyTorch. Start reading at train.py."""
