"""Moved to qlora_kit/task_settings.py; import from there."""

from qlora_kit.task_settings import *  # noqa: F403
