"""Distributed training: the process group of all ranks, heartbeats between them, and a watchdog for each."""
