"""Model directories in other forms."""
