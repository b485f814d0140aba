"""Synthetic training data from personas or passages, written by a model behind a server.

prompts (what is asked) -> server (who answers) -> filters (what is kept) -> pipeline (the run)
"""
