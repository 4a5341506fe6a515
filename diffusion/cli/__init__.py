"""The command line `python -m diffusion`."""
