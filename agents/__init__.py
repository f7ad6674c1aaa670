"""What a provider knows, sees and may do, how it decides, and the rules of the game: shared by both worlds."""
