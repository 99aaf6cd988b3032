"""One script per claim of speed or memory, each beside PEFT in one run: `python -m benchmarks`."""
