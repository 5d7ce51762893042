"""Errors that end a run with one line for the person who started it, not with a stack trace."""

from __future__ import annotations


class RunError(RuntimeError):
    """A run that cannot begin or go on; the message says what is wrong and the way out."""
