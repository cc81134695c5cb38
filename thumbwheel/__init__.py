"""The spine of thumbwheel: event schemas, the log, the rollout fold, the adapter store, settings, command line."""

__version__ = "0.1.0"
