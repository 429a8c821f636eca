"""Tables of the pages on what was measured, from the results that the benchmarks wrote."""
