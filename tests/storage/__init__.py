"""Tests of `rayflow.storage`."""
