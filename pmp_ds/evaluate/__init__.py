"""What a finished model can do, and what its ticket looks like from within: plain torch."""
