"""Learning hash weights: capture a model's queries and keys, train on them, ship the result."""
