"""Measuring the library: timing, results and their comparison, and what kernels cost without a GPU."""
