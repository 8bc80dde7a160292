"""`hata demo`: a language model answers from a long prompt, with dense attention and with hata."""
