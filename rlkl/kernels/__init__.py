"""Triton, which nothing else imports: logits.py with its torch twin plain.py, and sampling.py."""
