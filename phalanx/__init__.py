"""Phalanx: expert-parallel serving of mixture-of-experts models that goes on when ranks die."""

__version__ = "0.1.0"
