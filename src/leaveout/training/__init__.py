"""Describe a training run once (Recipe), and run it plainly, for many weightings at once, or in jets."""
