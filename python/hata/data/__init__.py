"""Hash weights as package data: for each model a safetensors file and its frontier as JSON."""
