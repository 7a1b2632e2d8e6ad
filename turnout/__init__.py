"""Distributed Mixture-of-Experts pretraining. The folders here are links to the packages."""

__version__ = "0.1.0"
