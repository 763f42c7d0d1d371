"""Text to token ids: learn a vocabulary, use one."""
