"""Images: data sets, procedural scenes, embedded encoders."""
