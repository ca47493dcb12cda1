"""Metrics of text to image: retrieval, the shapes score, distances to real pictures, CLIPScore, the LLM's language."""
