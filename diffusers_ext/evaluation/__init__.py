"""What the tools are judged by: paired pictures, drift, accuracy, distances of distributions."""
