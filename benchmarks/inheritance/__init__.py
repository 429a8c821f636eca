"""The parts of ``benchmarks/inheritance.py``."""
