"""What all training runs share."""
