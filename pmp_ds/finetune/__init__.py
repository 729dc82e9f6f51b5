"""Fine-tuning of a release: with the ticket (authorized), without it, and the controls."""
