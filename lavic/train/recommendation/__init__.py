"""Stage 2: conversations with candidates in, the loss of the right candidate's ID out."""
