"""Forebay: one self-hosted server in front of your own AI models."""

__version__ = "0.1.0"
