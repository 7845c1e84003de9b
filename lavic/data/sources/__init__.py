"""Readers of input files: catalogues as streams of records (JSON, csv, parquet), links to photos, looks of items."""
