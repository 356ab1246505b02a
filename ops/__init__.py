"""The operators of Qwen3-Next as torch.library ops."""
