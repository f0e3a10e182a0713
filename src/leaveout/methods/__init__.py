"""Methods to compare with: one file each, all with `score(queries, corpus) -> [query, train]` float32.

Positive means that the training row helps the query: removing it raises the query's loss. `bm25` and `random_scores` take
texts; the others are objects made from a task (`leaveout.training.tasks.task_of(recipe)`) and trained parameters, and take
queries and rows in the form of the recipe's examples. docs/reference/methods.md lists them with their costs.
"""
