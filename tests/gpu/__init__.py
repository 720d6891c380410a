"""What one machine with one GPU can verify: `make test-gpu`. Here the same scenarios run on the CPU."""
