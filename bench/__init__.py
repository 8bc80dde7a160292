"""`python -m bench`: every operator alone, and the whole step against dense attention."""
