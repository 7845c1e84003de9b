"""The forms in which catalogues come, as streams of records: JSON, csv, parquet."""
