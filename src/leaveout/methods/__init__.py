"""Attribution methods, one file each: `registry` has their names, `scorer` what they get, `scores` their files.

A file has a method's function `(scorer, checkpoint) -> scores [query, train]`, made of what can also be called alone:
`score(queries, corpus)` float32, of texts (`bm25`, `random_scores`), or of an object made from a task
(`leaveout.training.tasks.task_of(recipe)`) and trained parameters, for rows in the form of the recipe's examples.
Positive means that the training row helps the query: removing it raises the query's loss.
"""
