"""Training: the loop, its log, whole runs."""
