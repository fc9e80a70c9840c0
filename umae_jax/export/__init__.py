"""What leaves this project: weights and code for other frameworks."""
