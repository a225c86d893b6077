"""Packing: video files, list files and frame folders into tar shards with an index; indexing and checking of shards.

Reads in this order: discover, lists, pack_plan (what to pack) -> pack_run (the loop, restart, parts) -> packers and
pack_video (one video: probe, encode, verify) -> shard_writer, scan (what is written). docs/data.md is the user's guide.
Pieces of videos: annotations (which), film_index (where they lie in the file), segments (cut out).
"""
