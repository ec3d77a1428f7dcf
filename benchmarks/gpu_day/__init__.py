"""What only a GPU can measure, in stages of at most 8 minutes: python -m benchmarks.gpu_day."""
