"""What a chat model is asked as a judge, and how its answer is read."""
