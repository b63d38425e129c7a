"""Activations of DeepSeek-V3 that are quantised: (rows, columns)."""

ROWS_COLS = ((32768, 7168), (32768, 4096), (4096, 7168))
