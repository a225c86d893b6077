"""Packing: video files, list files and frame folders into tar shards with an index; indexing and checking of shards.

Reads in this order: command (arguments) -> sources, lists, plan (what to pack) -> run (the loop, restart, parts) ->
sample (one video: probe, encode, verify) -> shards, scan (what is written). docs/data.md is the user's guide.
Pieces of videos: annotations (which), film_index (where they lie in the file), segments (cut out).
"""
