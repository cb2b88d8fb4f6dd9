"""Rows of data files, one at a time: JSON lines, parquet, Hugging Face dataset folders."""
