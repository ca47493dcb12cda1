"""Stage 2, text to image: a pretrained LLM that speaks visual tokens."""
