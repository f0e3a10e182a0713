"""Pages of what was found: rows with the words that did it, tokens that answer each other, predictions."""
