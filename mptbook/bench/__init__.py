"""Measurements side by side: this package, its peers, and the limits of the machine."""
