"""Post-training quantization: one file a method, and what they share."""
