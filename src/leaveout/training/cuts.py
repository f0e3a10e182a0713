"""What of a recipe's examples is cut off, counted before the training."""

from __future__ import annotations

from leaveout.training.recipe import Recipe
from leaveout.training.tasks import Task


def cut_notes(recipe: Recipe, task: Task) -> list[str]:
    """One sentence on how many examples are cut and how much of them, or none. Cost: every example is tokenised once."""
    if task.cut is None:
        return []
    cuts = [cut for row in recipe.examples if (cut := task.cut(row))]
    if not cuts:
        return []
    where, what = f"max_tokens = {recipe.max_tokens}", "tokens"
    if recipe.kind == "microgpt":
        where, what = "microgpt reads", "characters, with their ends,"
    return [
        f"{len(cuts)} of {len(recipe.examples)} rows are longer than {where} and are cut there: "
        f"{sum(cuts)} {what} are not learned."
    ]
