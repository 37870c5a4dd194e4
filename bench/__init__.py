"""Workloads, providers and measurements. Run `python -m bench --help`."""
