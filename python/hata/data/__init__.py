"""Hash weights as package data, one safetensors file a model."""
