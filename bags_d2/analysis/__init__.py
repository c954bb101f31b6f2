"""Pictures and tables that show what a long tail does to a classifier."""
