"""Benchmark suites: tokenizers trained under one setting, scored on the same pictures, and one report of them all."""
