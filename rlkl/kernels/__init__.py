"""The two functions on a tile of logits: plain.py in torch, logits.py in Triton, which nothing else imports."""
