"""Standard benchmarks through EleutherAI's lm-eval: its tasks, prompts and metrics on every form of a run."""
