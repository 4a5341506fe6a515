"""Time, memory and error of the kernels, against what people write without them: `python -m benchmarks`."""
