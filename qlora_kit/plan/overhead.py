"""What a process holds beside its tensors; scripts/bench_memory.py shows how far off the whole plan is."""

from __future__ import annotations

OVERHEAD = "framework and allocator"
FRAMEWORK_BYTES = 64 * 2**20
"""Libraries loaded on the way, code made for matrix products, the tokenizer."""
