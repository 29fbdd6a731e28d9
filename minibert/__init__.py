"""minibert: BioBERT distilled into CompactBioBERT, written out in plain PyTorch.

The reading order is in README.md; it begins with `minibert/model.py`.
"""
