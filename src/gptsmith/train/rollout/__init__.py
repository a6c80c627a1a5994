"""Answers that a policy generates while it is trained, and what they are worth."""
