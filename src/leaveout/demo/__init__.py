"""The README's first command: a small corpus with planted culprits, and the run that finds them."""
