"""Segmentation by free text: masks of queries, the published sets' protocols, pictures."""
