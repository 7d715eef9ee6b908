"""Use and look at what train.py trained."""
