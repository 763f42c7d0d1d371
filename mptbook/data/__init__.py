"""Texts to batches: corpora, packed rows, the order in which they are seen."""
