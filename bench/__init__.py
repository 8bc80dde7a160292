"""``hata bench``: every operator alone, and the whole decoding step against dense attention."""
