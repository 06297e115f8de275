"""Durable things: object stores, the checkpoint layout, snapshots of state, manifests and their retention."""
