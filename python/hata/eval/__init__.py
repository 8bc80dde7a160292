"""What a sparse token costs a language model: likelihood and answers, by method and budget."""
