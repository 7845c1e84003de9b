"""What a run records: its journal, and MLflow fed from it."""
