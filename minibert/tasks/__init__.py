"""The tasks that `minibert.finetune` knows; what they share is in `task.py`."""
