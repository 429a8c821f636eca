"""Engines of the embedded server; each imports its own library, and no other module does."""
