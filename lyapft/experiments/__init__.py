"""Experiments on random layers and on finished runs; each returns numbers, and knows no trainer."""
