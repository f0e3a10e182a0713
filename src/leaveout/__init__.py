"""Which training data made the model do this, and what would it do without it?"""

__version__ = "0.1.0"
