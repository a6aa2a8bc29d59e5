"""What a recipe's steps are made of; the only room that knows every room."""
