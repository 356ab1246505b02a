"""Qwen3-Next as pure functions over parameter pytrees."""
