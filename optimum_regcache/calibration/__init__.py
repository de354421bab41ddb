"""Forward passes that feed the observers of static scales."""
