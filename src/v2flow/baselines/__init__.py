"""Tokenizers to compare with, on the same data, callbacks and configuration."""
