"""Retrieval targets: encoders, rankings and metrics."""
