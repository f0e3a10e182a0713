"""Methods to compare with: one file each, `score(queries, corpus) -> [query, train]`."""
