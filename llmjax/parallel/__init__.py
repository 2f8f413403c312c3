"""Meshes and sharding rules. Knows no model: a parameter is known by the names of its axes."""
