"""The deletion engine: measure a training run, predict it without some of its data, prove it by retraining."""
