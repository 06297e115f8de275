"""Short programs; each prints what it proves, and each is run by a test."""
