"""How much of the attention selectors find, on captures of held-out text."""
