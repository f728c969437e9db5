"""What an interrupted conversion leaves behind, and how the next one goes on with it."""
