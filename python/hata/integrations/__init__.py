"""hata inside other people's libraries."""
