"""Where a concept shows in a video, read from attention."""
