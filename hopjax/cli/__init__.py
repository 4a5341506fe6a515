"""The command line `python -m hopjax`: energies of image data sets, which samples to replay, and how settings change the ranking.

For people who write no JAX. Needs the extra `cli`. Everything that takes long to import is imported when a command runs.
"""
