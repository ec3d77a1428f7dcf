"""The policy: a Hugging Face causal LM, the critic, LoRA and the optimizer."""
