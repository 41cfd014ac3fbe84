"""What every layer and structure is made of; knows no family."""
