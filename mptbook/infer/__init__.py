"""Using a model: cache, sampling, generation."""
