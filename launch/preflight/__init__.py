"""`lavic preflight`: checks of the nodes of a job."""
