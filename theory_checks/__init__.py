"""The theory of arXiv:2605.27975 held against numbers: `python -m theory_checks`."""
