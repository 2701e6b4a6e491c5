"""What an operator of image search runs over a collection."""
