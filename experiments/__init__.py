"""Scripts that compare and measure, and the results they wrote."""
