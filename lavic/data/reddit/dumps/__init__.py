"""Reading dumps of Reddit: compressed files of one JSON object per line."""
