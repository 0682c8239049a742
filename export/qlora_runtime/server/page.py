"""The chat page: one file, which loads nothing and may reach nothing but this server."""

import base64
import hashlib
import re
from functools import cache
from importlib.resources import files


@cache
def read_page() -> tuple[str, str]:
    """The page, and a Content-Security-Policy that lets its own script and style run and nothing else."""
    text = (files("qlora_runtime.server") / "chat.html").read_text(encoding="utf-8")
    own = {
        tag: " ".join(_digest(found) for found in re.findall(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL))
        for tag in ("script", "style")
    }
    policy = {
        "default-src": "'none'",
        "script-src": own["script"],
        "style-src": own["style"],
        "connect-src": "'self'",
        "img-src": "data:",  # its empty icon
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    return text, "; ".join(f"{name} {value}" for name, value in policy.items())


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
