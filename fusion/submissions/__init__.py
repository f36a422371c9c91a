"""Submissions: what a night publishes, and what has to hold before it may."""
