"""What more than one of the tools uses."""
