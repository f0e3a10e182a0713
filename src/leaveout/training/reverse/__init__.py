"""Going back through a training run: exact first-order effects, and what each unit did to the parameters."""
