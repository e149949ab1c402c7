"""Deterministic simulation: the state machines, and models of Kafka and Postgres, under a seeded scheduler."""
