"""The tiny run that these tests share."""

from tiny_run import exported_run, trained_run

__all__ = ["exported_run", "trained_run"]
