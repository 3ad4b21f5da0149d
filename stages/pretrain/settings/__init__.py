"""What a method can be told, one file a method. Nothing here imports torch: planning a pipeline reads these."""
