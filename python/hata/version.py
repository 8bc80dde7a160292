"""The version of the distribution, hata-attention."""

VERSION = "0.1.0"
