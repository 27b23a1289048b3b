"""What turns pictures into answers."""
