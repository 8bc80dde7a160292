"""The subcommands of `hata`, one a file."""
