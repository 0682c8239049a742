"""`qlora-runtime serve`: a bundle behind an OpenAI-compatible HTTP endpoint. Needs the extra `serve`."""
