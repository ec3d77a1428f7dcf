"""What surrounds the loop: configuration, construction, checks, evaluation, checkpoints, log."""
