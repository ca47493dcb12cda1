"""Benchmark suites: rows trained under one setting, scored on the same samples, and one report of them all."""
