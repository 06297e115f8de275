"""Nexmark: the benchmark of streaming engines, an online auction of persons, auctions and bids.

`generator` makes the events, `source` reads them as streams, the query modules hold one flow a query with its SQL
beside it, `check` compares the two, and ``python -m examples.nexmark`` runs them. See README.md in this folder.
"""
