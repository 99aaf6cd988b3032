"""Tasks: records -> examples in words (task.py), their metrics, and raw text for pre-training (raw.py)."""
