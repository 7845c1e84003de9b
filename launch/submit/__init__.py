"""`lavic submit` and its sub-commands: status, logs, cancel."""
