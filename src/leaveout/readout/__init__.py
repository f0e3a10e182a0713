"""Find and value training rows by the readout of a language model (arXiv 2604.16197)."""
