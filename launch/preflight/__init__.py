"""`lavic preflight`: can the nodes of a job do what it needs?"""
