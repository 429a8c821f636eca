"""The stability benchmark: the same runs, provoked, under every method of keeping them stable."""
