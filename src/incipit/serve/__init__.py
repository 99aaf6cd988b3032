"""Serving: mixed-task batches over one frozen backbone."""
