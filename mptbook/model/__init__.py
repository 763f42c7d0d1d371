"""The model: configuration, norms, positions, attention, initialisation."""
