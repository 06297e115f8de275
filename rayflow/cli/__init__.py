"""The command line, thin: it loads files, calls the public API and prints."""
